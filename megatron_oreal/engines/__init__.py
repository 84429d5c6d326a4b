"""Generation engines behind one interface: the local engine and SGLang servers."""
