"""The policy's tools: the wire protocol, the client of the tools server, and the host's side of a rollout."""
