"""The deciding daemon: registry, placement, jobs, the control plane's API and the gateway."""
