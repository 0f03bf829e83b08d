"""The torch.compile backend: from a Dynamo graph to a callable with state."""
