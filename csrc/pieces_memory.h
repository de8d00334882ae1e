// What short stretches of text have become: a table that forgets what has not been seen for long.

#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <string_view>

namespace megalm::pieces {

// An entry is one line of the processor's cache, and for texts of more than 32 bytes or 6 symbols another one, its tail.
struct alignas(64) Remembered {
  static constexpr size_t kWords = 4, kSymbols = 6;

  uint64_t words[kWords];  // the text, NULs after it
  int32_t symbols[kSymbols];
  uint8_t bytes, count;
  bool unknown;  // one of the symbols is a character that no piece covers
  float limit;   // see Unigram

  size_t tail_bytes() const { return bytes > 8 * kWords ? (bytes - 8 * kWords + 3) / 4 * 4 : 0; }
};

struct alignas(64) Tail {
  char bytes[64];  // the rest of the text, then the other symbols
};

// `count` items of NULs, in few and large pages where the system has them: they are read at random.
template <class Item>
class Table {
 public:
  explicit Table(size_t count) {
    constexpr size_t kPage = size_t(1) << 21;
    const size_t size = (count * sizeof(Item) + kPage - 1) / kPage * kPage;
    items_.reset(static_cast<Item*>(std::aligned_alloc(kPage, size)));
    if (!items_) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
    madvise(items_.get(), size, MADV_HUGEPAGE);
#endif
    std::memset(static_cast<void*>(items_.get()), 0, size);
  }

  Item& operator[](size_t at) { return items_.get()[at]; }
  const Item& operator[](size_t at) const { return items_.get()[at]; }

 private:
  struct Free {
    void operator()(Item* items) const { std::free(items); }
  };

  std::unique_ptr<Item, Free> items_;
};

class Memory {
 public:
  static constexpr size_t kLongest = 8 * Remembered::kWords + sizeof(Tail) / 2;
  static constexpr size_t kMostSymbols = Remembered::kSymbols + sizeof(Tail) / 4;

  Memory() : entries_(size_t(1) << (kBits + 1)), tails_(size_t(1) << (kBits + 1)) {}

  // A text of at most kLongest bytes, after which 32 can be read, and where it would be.
  struct Key {
    std::string_view text;
    uint64_t words[Remembered::kWords];
    size_t place;
  };

  // Fills a key; begins to fetch the entries that it is looked for in.
  void make_key(std::string_view text, Key* key) const {
    key->text = text;
    read(key);
    key->place = place_of(*key);
    __builtin_prefetch(&entries_[key->place]);
    __builtin_prefetch(&entries_[key->place + 1]);
  }

  // where a text is, or kNowhere
  size_t find(const Key& key) const {
    for (size_t at = key.place; at < key.place + 2; ++at) {
      const Remembered& entry = entries_[at];
      if (entry.bytes != key.text.size() || !equal(entry.words, key.words)) continue;
      if (key.text.size() <= kHead) return at;
      if (!std::memcmp(tails_[at].bytes, key.text.data() + kHead, key.text.size() - kHead)) return at;
    }
    return kNowhere;
  }

  const Remembered& operator[](size_t at) const { return entries_[at]; }

  // remembers what a text has become, if there is room for so many symbols
  void add(const Key& key, const int32_t* symbols, size_t count, bool unknown, float limit) {
    Remembered made = {};
    std::memcpy(made.words, key.words, kHead);
    made.bytes = uint8_t(key.text.size());
    const size_t near = std::min(count, Remembered::kSymbols), taken = made.tail_bytes();
    if (taken + 4 * (count - near) > sizeof(Tail)) return;
    made.count = uint8_t(count), made.unknown = unknown, made.limit = limit;
    std::memcpy(made.symbols, symbols, 4 * near);
    if (has_tail(entries_[key.place])) tails_[key.place + 1] = tails_[key.place];
    entries_[key.place + 1] = entries_[key.place];
    entries_[key.place] = made;
    if (!has_tail(made)) return;
    char* tail = tails_[key.place].bytes;
    if (taken) std::memcpy(tail, key.text.data() + kHead, key.text.size() - kHead);
    std::memcpy(tail + taken, symbols + near, 4 * (count - near));
  }

  // writes an entry's symbols, and up to kSymbols of anything; returns their end
  int32_t* copy(size_t at, int32_t* out) const {
    const Remembered& entry = entries_[at];
    std::memcpy(out, entry.symbols, sizeof entry.symbols);
    if (entry.count > Remembered::kSymbols)
      std::memcpy(out + Remembered::kSymbols, tails_[at].bytes + entry.tail_bytes(), 4 * (entry.count - Remembered::kSymbols));
    return out + entry.count;
  }

  static constexpr size_t kNowhere = size_t(-1);

 private:
  static constexpr int kBits = 16;
  static constexpr size_t kHead = 8 * Remembered::kWords;

  static bool has_tail(const Remembered& entry) { return entry.bytes > kHead || entry.count > Remembered::kSymbols; }

  static void read(Key* key) {
    static constexpr struct Mask {
      uint8_t bytes[2 * kHead];
      constexpr Mask() : bytes{} {
        for (size_t i = 0; i < kHead; ++i) bytes[i] = 0xff;
      }
    } kMask;
    const uint8_t* mask = kMask.bytes + kHead - std::min(kHead, key->text.size());
    for (size_t i = 0; i < Remembered::kWords; ++i) {
      uint64_t keep;
      std::memcpy(&keep, mask + 8 * i, 8);
      std::memcpy(&key->words[i], key->text.data() + 8 * i, 8);
      key->words[i] &= keep;
    }
  }

  static bool equal(const uint64_t* left, const uint64_t* right) {
    uint64_t differ = 0;
    for (size_t i = 0; i < Remembered::kWords; ++i) differ |= left[i] ^ right[i];
    return !differ;
  }

  static size_t place_of(const Key& key) {
    constexpr uint64_t kOdd[] = {0x9e3779b97f4a7c15u, 0xbf58476d1ce4e5b9u, 0x94d049bb133111ebu, 0xd6e8feb86659fd93u};
    uint64_t hash = key.text.size();
    for (size_t i = 0; i < Remembered::kWords; ++i) hash += (key.words[i] ^ key.words[i] >> 32) * kOdd[i];
    for (size_t at = kHead; at < key.text.size(); at += 4) {
      uint32_t part = 0;
      std::memcpy(&part, key.text.data() + at, std::min<size_t>(4, key.text.size() - at));
      hash = (hash ^ hash >> 29 ^ part) * kOdd[0];
    }
    return ((hash ^ hash >> 32) * kOdd[1] >> (64 - kBits)) << 1;
  }

  Table<Remembered> entries_;  // in pairs
  Table<Tail> tails_;
};

}  // namespace megalm::pieces
