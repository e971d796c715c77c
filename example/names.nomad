# Name servers of the group, and lines of /etc/hosts.
job "names" {
  type = "batch"

  group "names" {
    network {
      mode = "bridge"

      dns {
        servers  = ["127.0.0.1", "127.0.0.2"]
        searches = ["internal.corp"]
        options  = ["ndots:2"]
      }
    }

    task "names" {
      driver = "shim"

      config {
        image       = "busybox:1"
        command     = "/bin/cat"
        args        = ["/etc/resolv.conf", "/etc/hosts"]
        extra_hosts = ["postgres:127.0.1.1", "v6:fd00::5", "node:host-gateway"]
      }

      resources {
        cpu    = 50
        memory = 32
      }
    }
  }
}
