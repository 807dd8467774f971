"""A server for many conversations: one batch of states, over OpenAI's protocol."""
