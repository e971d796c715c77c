# A service: a signal handler, a private directory from a template, a read-only root.
job "service" {
  group "service" {
    task "service" {
      driver      = "shim"
      kill_signal = "SIGINT"

      config {
        image           = "busybox:1"
        command         = "/bin/sh"
        args            = ["-c", "trap 'echo reloaded' HUP; trap 'echo bye; exit 0' INT; cat /etc/greeting; while :; do sleep 1; done"]
        readonly_rootfs = true

        mounts = [
          { type = "bind", source = "local/greeting", target = "/etc/greeting", options = ["ro"] },
          { type = "tmpfs", target = "/tmp", options = ["size=16m"] },
        ]
      }

      template {
        data        = "hello from a template"
        destination = "local/greeting"
        change_mode = "signal"
        change_signal = "SIGHUP"
      }

      resources {
        cpu    = 100
        memory = 32
      }
    }
  }
}
