#!/bin/sh
# Makes host keys and a user who may log in with a key, and becomes sshd.
set -e
mkdir -p /run/sshd
ssh-keygen -A > /dev/null
useradd --create-home --shell /bin/bash app
install -d -m 700 -o app -g app /home/app/.ssh
ssh-keygen -q -t ed25519 -N '' -f /root/key
install -m 600 -o app -g app /root/key.pub /home/app/.ssh/authorized_keys
exec /usr/sbin/sshd -D -e -p 2222
