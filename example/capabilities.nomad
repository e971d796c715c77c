# What a task may do. The agent's plugin block must allow it:
# security { allow_caps = ["SYS_TIME", "NET_BIND_SERVICE"] allow_devices = ["/dev/fuse"] }
job "capabilities" {
  type = "batch"

  group "capabilities" {
    task "capabilities" {
      driver = "shim"
      user   = "nobody"

      config {
        image        = "busybox:1"
        command      = "/bin/sh"
        args         = ["-c", "grep -E 'Cap|NoNewPrivs|Seccomp' /proc/self/status; ls -l /dev/fuse"]
        cap_drop     = ["ALL"]
        cap_add      = ["SYS_TIME", "NET_BIND_SERVICE"]
        devices      = ["/dev/fuse"]
        group_add    = ["audio"]
        security_opt = ["no-new-privileges"]
      }

      resources {
        cpu    = 50
        memory = 32
      }
    }
  }
}
