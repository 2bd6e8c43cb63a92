"""What attention is in a model: facts of every layer, rotary embedding forwards and backwards."""
