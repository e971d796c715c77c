# As it was written for nomad-driver-containerd: it runs unchanged where the binary is linked as containerd-driver.
job "drop-in" {
  group "drop-in" {
    task "drop-in" {
      driver = "containerd-driver"

      config {
        image    = "ubuntu:22.04"
        command  = "sleep"
        args     = ["600s"]
        hostname = "foobar"
        seccomp  = true
        cwd      = "/home"
        cap_add  = ["CAP_SYS_ADMIN"]
        cap_drop = ["CAP_CHOWN"]
        host_dns = true
        pid_mode = "host"
        mounts = [
          { type = "bind", target = "/target", source = "/tmp", options = ["rbind", "ro"] },
        ]
      }

      resources {
        cpu    = 100
        memory = 64
      }
    }
  }
}
