"""A small seeded grammar of English stories and chats: the training text of the tiny checkpoint."""
