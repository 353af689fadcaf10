"""Number formats in torch: quantise, dequantise, and which weights of a model are stored in them."""
