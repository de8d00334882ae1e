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

  // Whether a text of at most kLongest bytes, after which 32 can be read, fits what is remembered at `*place`.
  const Remembered* find(std::string_view text, size_t* place) const {
    uint64_t words[Remembered::kWords];
    read(text, words);
    *place = place_of(words, text);
    for (size_t way = 0; way < 2; ++way) {
      const Remembered& entry = entries_[*place + way];
      if (entry.bytes != text.size() || !equal(entry.words, words)) continue;
      constexpr size_t kHead = 8 * Remembered::kWords;
      if (text.size() <= kHead || !std::memcmp(entry.tail, text.data() + kHead, text.size() - kHead)) return &entry;
    }
    return nullptr;
  }

  // remembers at the place that `find` gave for the text, if there is room for so many symbols
  void add(size_t place, std::string_view text, const int32_t* symbols, size_t count, bool unknown, float limit) {
    Remembered made = {};
    read(text, made.words);
    made.bytes = uint8_t(text.size());
    const size_t near = std::min(count, Remembered::kSymbols), taken = made.tail_bytes();
    if (taken + 4 * (count - near) > Remembered::kTail) return;
    made.count = uint8_t(count), made.unknown = unknown, made.limit = limit;
    std::memcpy(made.symbols, symbols, 4 * near);
    if (taken) std::memcpy(made.tail, text.data() + 8 * Remembered::kWords, text.size() - 8 * Remembered::kWords);
    std::memcpy(made.tail + taken, symbols + near, 4 * (count - near));
    entries_[place + 1] = entries_[place];
    entries_[place] = made;
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

  static void read(std::string_view text, uint64_t* words) {
    static constexpr struct Mask {
      uint8_t bytes[64];
      constexpr Mask() : bytes{} {
        for (int i = 0; i < 32; ++i) bytes[i] = 0xff;
      }
    } kMask;
    const uint8_t* mask = kMask.bytes + 32 - std::min<size_t>(32, text.size());
    for (size_t i = 0; i < Remembered::kWords; ++i) {
      uint64_t keep;
      std::memcpy(&keep, mask + 8 * i, 8);
      std::memcpy(&words[i], text.data() + 8 * i, 8);
      words[i] &= keep;
    }
  }

  static bool equal(const uint64_t* left, const uint64_t* right) {
    uint64_t differ = 0;
    for (size_t i = 0; i < Remembered::kWords; ++i) differ |= left[i] ^ right[i];
    return !differ;
  }

  static size_t place_of(const uint64_t* words, std::string_view text) {
    constexpr uint64_t kOdd[] = {0x9e3779b97f4a7c15u, 0xbf58476d1ce4e5b9u, 0x94d049bb133111ebu, 0xd6e8feb86659fd93u};
    uint64_t hash = text.size();
    for (size_t i = 0; i < Remembered::kWords; ++i) hash += (words[i] ^ words[i] >> 32) * kOdd[i];
    for (size_t at = 8 * Remembered::kWords; at < text.size(); at += 4) {
      uint32_t part = 0;
      std::memcpy(&part, text.data() + at, std::min<size_t>(4, text.size() - at));
      hash = (hash ^ hash >> 29 ^ part) * kOdd[0];
    }
    return ((hash ^ hash >> 32) * kOdd[1] >> (64 - kBits)) << 1;
  }

  std::vector<Remembered> entries_;  // in pairs
};

}  // namespace megalm::pieces
