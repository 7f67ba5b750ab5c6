"""What matchers compare: layers of a forward pass, tapped and set against the teacher's."""
