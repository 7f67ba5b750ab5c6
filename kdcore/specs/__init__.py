"""What a spec file may say, as frozen pydantic models."""
