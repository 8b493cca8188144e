"""Whether what production sees is still what the model was made for."""
