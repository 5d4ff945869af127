"""Rule tables: one subject each, operator to rule."""
