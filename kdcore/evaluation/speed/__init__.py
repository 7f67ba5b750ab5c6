"""How fast a decoder is on this machine: methods of `bench`, servers, break-even."""
