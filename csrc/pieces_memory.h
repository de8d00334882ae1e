// What short stretches of text have become: a table that forgets what has not been seen for long.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <string_view>
#include <vector>

namespace megalm::pieces {

// An entry is two lines of the processor's cache; the second is read for texts of more than 32 bytes or 6 symbols.
struct alignas(64) Remembered {
  static constexpr size_t kWords = 4, kSymbols = 6, kTail = 64;

  uint64_t words[kWords];  // the text, NULs after it
  int32_t symbols[kSymbols];
  uint8_t bytes, count;
  bool unknown;  // one of the symbols is a character that no piece covers
  float limit;   // see Unigram
  char tail[kTail];  // the rest of the text, then the other symbols

  size_t tail_bytes() const { return bytes > 8 * kWords ? (bytes - 8 * kWords + 3) / 4 * 4 : 0; }
};

class Memory {
 public:
  static constexpr size_t kLongest = 8 * Remembered::kWords + Remembered::kTail / 2;
  static constexpr size_t kMostSymbols = Remembered::kSymbols + Remembered::kTail / 4;

  Memory() : entries_(size_t(1) << (kBits + 1)) {}

  // A text of at most kLongest bytes, after which 32 can be read, and where it would be.
  struct Key {
    std::string_view text;
    uint64_t words[Remembered::kWords];
    size_t place;
  };

  Key key(std::string_view text) const {
    Key made = {text, {}, 0};
    read(&made);
    made.place = place_of(made);
    __builtin_prefetch(&entries_[made.place]);
    return made;
  }

  const Remembered* find(const Key& key) const {
    for (size_t way = 0; way < 2; ++way) {
      const Remembered& entry = entries_[key.place + way];
      if (entry.bytes != key.text.size() || !equal(entry.words, key.words)) continue;
      if (key.text.size() <= kHead || !std::memcmp(entry.tail, key.text.data() + kHead, key.text.size() - kHead)) return &entry;
    }
    return nullptr;
  }

  // remembers what a text has become, if there is room for so many symbols
  void add(const Key& key, const int32_t* symbols, size_t count, bool unknown, float limit) {
    Remembered made = {};
    std::memcpy(made.words, key.words, kHead);
    made.bytes = uint8_t(key.text.size());
    const size_t near = std::min(count, Remembered::kSymbols), taken = made.tail_bytes();
    if (taken + 4 * (count - near) > Remembered::kTail) return;
    made.count = uint8_t(count), made.unknown = unknown, made.limit = limit;
    std::memcpy(made.symbols, symbols, 4 * near);
    if (taken) std::memcpy(made.tail, key.text.data() + kHead, key.text.size() - kHead);
    std::memcpy(made.tail + taken, symbols + near, 4 * (count - near));
    entries_[key.place + 1] = entries_[key.place];
    entries_[key.place] = made;
  }

  // writes an entry's symbols, and up to kSymbols of anything; returns their end
  static int32_t* copy(const Remembered& entry, int32_t* out) {
    std::memcpy(out, entry.symbols, sizeof entry.symbols);
    if (entry.count > Remembered::kSymbols)
      std::memcpy(out + Remembered::kSymbols, entry.tail + entry.tail_bytes(), 4 * (entry.count - Remembered::kSymbols));
    return out + entry.count;
  }

 private:
  static constexpr int kBits = 15;
  static constexpr size_t kHead = 8 * Remembered::kWords;

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

  std::vector<Remembered> entries_;  // in pairs
};

}  // namespace megalm::pieces
