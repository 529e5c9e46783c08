"""Apply, in a straight line; streaming, tensor by tensor."""
