"""Stands in for the platform: a Hopper, unless a test says otherwise."""


class Platform:
    device_name = "stand-in"
    cuda = True
    capability = 90

    def is_cuda(self):
        return self.cuda

    def is_device_capability(self, capability):
        return self.capability == capability

    def get_device_capability(self):
        return self.capability


current_platform = Platform()
