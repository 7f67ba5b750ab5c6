"""How a plugin declares components and jobs, and how kdcore finds, chooses and builds them."""
