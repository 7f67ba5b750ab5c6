"""Generated responses: by a local model or an endpoint into a file, or by the student on policy."""
