"""The trainer on megatron-core: the native one's protocol and losses, in any parallel layout."""
