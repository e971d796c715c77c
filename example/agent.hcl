# An agent with the driver under both of its names. plugin_dir holds the binary and a link to it.
plugin_dir = "/opt/nomad/plugins"

plugin "nomad-driver-shim" {
  config {
    # Every option has a default; see docs/options.md.
  }
}

plugin "containerd-driver" {
  config {
    enabled            = true
    containerd_runtime = "io.containerd.runc.v2"
  }
}
