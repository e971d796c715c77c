# A batch job: prints a line and ends.
job "hello" {
  type = "batch"

  group "hello" {
    task "hello" {
      driver = "shim"

      config {
        image   = "busybox:1"
        command = "/bin/sh"
        args    = ["-c", "echo hello from $(hostname)"]
      }

      resources {
        cpu    = 100
        memory = 32
      }
    }
  }
}
