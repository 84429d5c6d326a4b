"""`megatron-oreal report`: one page of HTML that shows what runs did, and how they differ."""
