"""Layer rules: how per-example gradients follow from a module's input and its output's gradient."""
