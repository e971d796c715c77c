# Limits of every kind. memory_max needs memory oversubscription on the servers.
job "limits" {
  type = "batch"

  group "limits" {
    task "limits" {
      driver = "shim"

      config {
        image          = "busybox:1"
        command        = "/bin/sh"
        args           = ["-c", "ulimit -n; cat /proc/sys/net/core/somaxconn; df -k /dev/shm; nproc"]
        pids_limit     = 32
        cpu_hard_limit = true
        cpuset_cpus    = "0"
        shm_size       = "32m"
        oom_score_adj  = 500
        ulimit { nofile = "1024:2048" }
        sysctl = { "net.core.somaxconn" = "512" }
      }

      resources {
        cpu        = 100
        memory     = 32
        memory_max = 64
      }
    }
  }
}
