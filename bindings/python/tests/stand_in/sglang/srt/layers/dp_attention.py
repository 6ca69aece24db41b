def is_allocation_symmetric():
    return True
