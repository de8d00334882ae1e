// Characters of UTF-8, and tables from two numbers to two.

#pragma once

#include <cstdint>
#include <cstring>
#include <string>
#include <string_view>
#include <vector>

namespace megalm::pieces {

constexpr uint32_t kCharacters = 0x110000;
constexpr std::string_view kLowBlock = "\xe2\x96\x81";  // U+2581, which stands for a blank

inline size_t character_bytes(char first) {
  return 0x4322111111111111u >> (uint8_t(first) >> 4 << 2) & 15;
}

// the character of `bytes` bytes at `text`
inline uint32_t character_at(const char* text, size_t bytes) {
  const auto byte = [text](size_t i) { return uint32_t(uint8_t(text[i])); };
  if (bytes == 1) return byte(0);
  if (bytes == 2) return (byte(0) & 0x1f) << 6 | (byte(1) & 0x3f);
  if (bytes == 3) return (byte(0) & 0x0f) << 12 | (byte(1) & 0x3f) << 6 | (byte(2) & 0x3f);
  return (byte(0) & 0x07) << 18 | (byte(1) & 0x3f) << 12 | (byte(2) & 0x3f) << 6 | (byte(3) & 0x3f);
}

// the same where four bytes can be read, without a branch that a text of several scripts makes hard to foresee
inline uint32_t character_of_four(const char* text, size_t bytes) {
  const auto byte = [text](size_t i) { return uint32_t(uint8_t(text[i])); };
  const uint32_t first = byte(0) & (0xffu >> (bytes + (bytes > 1)));
  return (first << 18 | (byte(1) & 0x3f) << 12 | (byte(2) & 0x3f) << 6 | (byte(3) & 0x3f)) >> (24 - 6 * bytes);
}

// writes a character; returns its bytes
inline size_t write_character(uint32_t code, uint8_t* out) {
  if (code < 0x80) return out[0] = code, 1;
  const size_t bytes = code < 0x800 ? 2 : code < 0x10000 ? 3 : 4;
  for (size_t i = bytes; --i > 0; code >>= 6) out[i] = 0x80 | (code & 0x3f);
  out[0] = (bytes == 2 ? 0xc0 : bytes == 3 ? 0xe0 : 0xf0) | code;
  return bytes;
}

// Appends the characters of a text; false where it is not UTF-8.
inline bool read_characters(std::string_view text, std::vector<uint32_t>* codes) {
  constexpr uint32_t kSmallest[5] = {0, 0, 0x80, 0x800, 0x10000};
  for (size_t at = 0; at < text.size();) {
    const size_t bytes = character_bytes(text[at]);
    if (at + bytes > text.size() || (bytes == 1 && uint8_t(text[at]) >= 0x80)) return false;
    for (size_t i = 1; i < bytes; ++i)
      if ((uint8_t(text[at + i]) & 0xc0) != 0x80) return false;
    const uint32_t code = character_at(text.data() + at, bytes);
    if (code < kSmallest[bytes] || code >= kCharacters || (code >= 0xd800 && code < 0xe000)) return false;
    codes->push_back(code);
    at += bytes;
  }
  return true;
}

// From two numbers to two; the first of these is -1 where there is no entry.
class PairTable {
 public:
  struct Value {
    int32_t first = -1, second = -1;
  };

  PairTable() : entries_(64), shift_(64 - 6) {}

  Value find(uint32_t left, uint32_t right) const {
    const uint64_t key = uint64_t(left) << 32 | right;
    const Entry* entry = &entries_[place_of(key)];
    for (; entry->key != key && entry->value.first >= 0; entry = next(entry)) {
    }
    return entry->value;  // an empty one's is {-1, -1}
  }

  template <class Function>  // (key: left << 32 | right, value)
  void for_each(const Function& function) {
    for (Entry& entry : entries_)
      if (entry.value.first >= 0) function(entry.key, entry.value);
  }

  // the entry's value, made {first, -1} if it is new; to be written before the next call
  Value& insert(uint32_t left, uint32_t right, int32_t first) {
    if (2 * (size_ + 1) > entries_.size()) grow();
    Entry& entry = place_for(uint64_t(left) << 32 | right);
    if (entry.value.first < 0) entry.value.first = first, ++size_;
    return entry.value;
  }

 private:
  struct Entry {
    uint64_t key = 0;
    Value value;
  };

  size_t place_of(uint64_t key) const {
    key = (key ^ key >> 32) * 0x9e3779b97f4a7c15u;
    return (key ^ key >> 32) * 0xbf58476d1ce4e5b9u >> shift_;
  }
  const Entry* next(const Entry* entry) const { return ++entry == entries_.data() + entries_.size() ? entries_.data() : entry; }

  Entry& place_for(uint64_t key) {
    const Entry* entry = &entries_[place_of(key)];
    while (entry->key != key && entry->value.first >= 0) entry = next(entry);
    Entry& found = entries_[entry - entries_.data()];
    found.key = key;
    return found;
  }

  void grow() {
    std::vector<Entry> old(2 * entries_.size());
    old.swap(entries_);
    --shift_;
    for (const Entry& entry : old)
      if (entry.value.first >= 0) place_for(entry.key) = entry;
  }

  std::vector<Entry> entries_;
  int shift_;
  size_t size_ = 0;
};

}  // namespace megalm::pieces
