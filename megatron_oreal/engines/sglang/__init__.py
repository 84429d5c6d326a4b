"""The SGLang engine: requests to servers, and their weights."""
