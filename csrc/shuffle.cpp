// numpy's RandomState.shuffle: the same generator (MT19937: Matsumoto, Nishimura, 1998) and the same Fisher-Yates shuffle,
// with the places to swap drawn ahead, so that memory is asked for them before they are needed. A library of its own,
// without torch.
#include <cstdint>
#include <utility>

namespace {

constexpr int kWords = 624, kAhead = 397, kBlock = 1024;

// The generator's state as numpy has it: 624 words, of which `position` are used up.
struct Generator {
  uint32_t* words;
  int position;
  uint32_t drawn[kWords];  // the numbers of the current words

  Generator(uint32_t* state, int used) : words(state), position(used) { temper(); }

  uint32_t next() {
    if (position == kWords) {
      twist();
      temper();
      position = 0;
    }
    return drawn[position++];
  }

  static uint32_t mixed(uint32_t high, uint32_t low) {
    const uint32_t word = (high & 0x80000000u) | (low & 0x7fffffffu);
    return (word >> 1) ^ ((low & 1u) ? 0x9908b0dfu : 0u);
  }

  void twist() {
    for (int i = 0; i < kWords - kAhead; ++i) words[i] = words[i + kAhead] ^ mixed(words[i], words[i + 1]);
    for (int i = kWords - kAhead; i < kWords - 1; ++i)
      words[i] = words[i + kAhead - kWords] ^ mixed(words[i], words[i + 1]);
    words[kWords - 1] = words[kAhead - 1] ^ mixed(words[kWords - 1], words[0]);
  }

  void temper() {
    for (int i = 0; i < kWords; ++i) {
      uint32_t word = words[i];
      word ^= word >> 11;
      word ^= (word << 7) & 0x9d2c5680u;
      word ^= (word << 15) & 0xefc60000u;
      drawn[i] = word ^ (word >> 18);
    }
  }
};

// Elements stop - 1 down to `first` each get another place at or below them: a number under the next power of two, drawn
// again while it is too high. `mask` is that power less one, the same for all of them.
template <class T>
void shuffle_range(T* data, uint32_t first, uint32_t last, uint32_t mask, Generator& random) {
  uint32_t places[kBlock + 1];
  for (uint32_t top = last;;) {
    const uint32_t wanted = top - first < kBlock ? top - first + 1 : kBlock;
    for (uint32_t found = 0; found < wanted;) {
      const uint32_t place = random.next() & mask;
      places[found] = place;
      __builtin_prefetch(data + place, 1);
      found += place <= top - found;
    }
    for (uint32_t i = 0; i < wanted; ++i) std::swap(data[top - i], data[places[i]]);
    if (top - first < wanted) return;
    top -= wanted;
  }
}

template <class T>
void shuffle(T* data, int64_t size, Generator& random) {
  auto last = static_cast<uint32_t>(size - 1);
  while (last > 0) {
    const uint32_t mask = 0xffffffffu >> __builtin_clz(last);
    const uint32_t first = (mask >> 1) + 1;
    shuffle_range(data, first, last, mask, random);
    last = first - 1;
  }
}

}  // namespace

// Shuffles `size` (1 .. 2^32) elements of 4 or 8 bytes and moves the generator on; returns its new position.
extern "C" __attribute__((visibility("default"))) int megalm_shuffle(void* data, int64_t size, int64_t element_bytes,
                                                                     uint32_t* state, int position) {
  Generator random(state, position);
  if (element_bytes == 4) shuffle(static_cast<uint32_t*>(data), size, random);
  if (element_bytes == 8) shuffle(static_cast<uint64_t*>(data), size, random);
  return random.position;
}
