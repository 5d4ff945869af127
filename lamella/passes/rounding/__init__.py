"""How the weights of linear layers are rounded when their inputs are known."""
