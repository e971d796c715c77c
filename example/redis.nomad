# A service with a host volume, a port over bridge mode and a Consul service with a check.
# The client needs `host_volume "redis" { path = "/srv/redis" }` and the CNI plugins in /opt/cni/bin.
job "redis" {
  group "redis" {
    network {
      mode = "bridge"
      port "redis" { to = 6379 }
    }

    volume "data" {
      type   = "host"
      source = "redis"
    }

    service {
      name = "redis"
      port = "redis"

      check {
        type     = "tcp"
        interval = "10s"
        timeout  = "2s"
      }
    }

    task "redis" {
      driver = "shim"

      volume_mount {
        volume      = "data"
        destination = "/data"
      }

      config {
        image           = "redis:7-alpine"
        args            = ["redis-server", "--save", "60", "1"]
        readonly_rootfs = true
        pids_limit      = 64
        sysctl = { "net.core.somaxconn" = "1024" }
        mounts = [{ type = "tmpfs", target = "/tmp", options = ["size=16m"] }]
      }

      resources {
        cpu        = 200
        memory     = 128
        memory_max = 256
      }
    }
  }
}
