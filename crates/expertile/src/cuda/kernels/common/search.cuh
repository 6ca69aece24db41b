// Binary search in a sorted list.
#pragma once

// The largest index whose entry is <= value, in a list that ascends from 0 and may repeat.
// Of experts that share a start, only the last can hold rows: it is the one found.
__device__ __forceinline__ int last_not_above(const int* list, int length, int value) {
    int low = 0;
    int high = length;
    while (high - low > 1) {
        const int middle = (low + high) >> 1;
        if (list[middle] <= value)
            low = middle;
        else
            high = middle;
    }
    return low;
}
