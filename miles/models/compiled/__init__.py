"""Training's hot operations in C++, forward and backward, compiled at first use where there is a compiler."""
