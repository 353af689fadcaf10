"""The decode kernel: whole decode steps in C++, compiled at first use where there is a compiler."""
