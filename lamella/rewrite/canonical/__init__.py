"""What `canonicalize` is made of: rules by subject, and the passes that no rule can say."""
