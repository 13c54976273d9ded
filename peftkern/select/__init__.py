"""What is trained: methods that choose among the tensors, rows or entries of a model."""
