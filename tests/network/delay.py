"""A line between two TAP devices that holds every frame for a time: delay.py IN OUT MILLISECONDS.

For kernels without netem. The devices are there as long as this runs."""

import collections
import fcntl
import os
import selectors
import struct
import sys
import time

TUNSETIFF, IFF_TAP, IFF_NO_PI = 0x400454CA, 0x2, 0x1000


def tap(name):
    device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(device, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TAP | IFF_NO_PI))
    return device


def main():
    first, second, delay = tap(sys.argv[1]), tap(sys.argv[2]), float(sys.argv[3]) / 1e3
    other = {first: second, second: first}
    held = collections.deque()  # (when it is due, where it goes, frame), in the order of time
    selector = selectors.DefaultSelector()
    for device in other:
        selector.register(device, selectors.EVENT_READ)
    while True:
        wait = max(0.0, held[0][0] - time.monotonic()) if held else None
        for key, _ in selector.select(wait):
            try:
                while True:
                    held.append((time.monotonic() + delay, other[key.fd], os.read(key.fd, 65536)))
            except BlockingIOError:
                pass
        while held and held[0][0] <= time.monotonic():
            _, device, frame = held.popleft()
            try:
                os.write(device, frame)
            except OSError:
                pass  # A device that is down takes none.


main()
