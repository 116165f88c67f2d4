"""Base and adapter to one model, tensor by tensor: which weights, which layers, which files, and how close it comes."""
