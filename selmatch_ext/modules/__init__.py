"""The user's nn.Module, as the engines treat it: unwrapped, copied, called in a state that is put back."""
