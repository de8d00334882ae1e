// Normalization as by sentencepiece's Normalizer (normalizer.cc): from the left, the longest sequence that the model's
// table has at a place is replaced; where a user-defined symbol stands nothing is.
//
// Most characters stay as they are. What may follow a character, or stand alone, to be replaced is read from the table
// once, so that a run of characters that stay is only looked over and copied.

#pragma once

#include <algorithm>
#include <stdexcept>
#include <unordered_map>

#include "pieces_trie.h"

namespace megalm::pieces {

struct Spec {
  std::string_view table;  // u32 size of a trie, the trie (a Darts-clone double array), texts that end with NUL
  bool trims;              // remove_extra_whitespaces
  bool dummy;              // add_dummy_prefix
  bool suffix;             // treat_whitespace_as_suffix: that blank is the last character
  bool escapes;            // escape_whitespaces: blanks become U+2581
};

class Normalizer {
 public:
  // Throws std::invalid_argument for a table that this cannot be sure to read as sentencepiece does.
  Normalizer(const Spec& spec, const std::vector<std::string_view>& symbols)
      : trims_(spec.trims), dummy_(spec.dummy), suffix_(spec.suffix), blank_(spec.escapes ? kLowBlock : " "), flags_(kCharacters), results_(kCharacters) {
    flags_[' '] = kBlank;
    if (!spec.table.empty()) read_table(spec.table);
    for (const std::string_view symbol : symbols) {
      std::vector<uint32_t> codes;
      if (!read_characters(symbol, &codes) || codes.empty()) throw std::invalid_argument("symbol");
      symbols_.add(codes, 0);
      flags_[codes[0]] |= kSymbol;
    }
    symbols_.finish();
  }

  std::string_view blank() const { return blank_; }

  // The text, which is UTF-8, as the model sees it; valid until the next call, as `blanks` is. 32 bytes follow it.
  std::string_view operator()(std::string_view text) {
    size_ = 0, blanks_.clear();
    for (size_t used; trims_ && !text.empty() && longest(text, &used) == " ";) text.remove_prefix(used);
    if (text.empty()) return {};
    reserve(text.size());
    if (dummy_ && !suffix_) add_blank();
    replace(text);
    while (trims_ && size_ >= blank_.size() && !std::memcmp(&out_[size_ - blank_.size()], blank_.data(), blank_.size()))
      size_ -= blank_.size();
    while (!blanks_.empty() && blanks_.back() >= size_) blanks_.pop_back();
    if (dummy_ && suffix_) add_blank();
    return {out_.data(), size_};
  }

  // where the blanks are that have been written
  const std::vector<size_t>& blanks() const { return blanks_; }

 private:
  // Replaced: alone; Starts: with what may follow it; Continues: after another one; Symbol: the first of a symbol
  enum : uint8_t { kReplaced = 1, kStarts = 2, kContinues = 4, kBlank = 8, kSymbol = 16 };

  struct Character {
    size_t bytes = 0;
    uint32_t code = 0;
    uint8_t flags = 0;
  };

  Character read(const char* at, const char* end) const {
    if (at >= end) return {};
    if (uint8_t(*at) < 0x80) return {1, uint8_t(*at), flags_[uint8_t(*at)]};
    const size_t bytes = character_bytes(*at);
    const uint32_t code = end - at < 4 ? character_at(at, bytes) : character_of_four(at, bytes);
    return {bytes, code, flags_[code]};
  }

  void replace(std::string_view text) {
    bool after_blank = trims_;
    const char *at = text.data(), *end = at + text.size(), *stays = at;
    for (Character now = read(at, end), next; at < end; now = next) {
      next = read(at + now.bytes, end);
      const uint8_t flags = now.flags & (next.flags & kContinues ? ~kContinues : ~(kContinues | kStarts));
      if (!flags) {
        at += now.bytes;
        continue;
      }
      if (at > stays) copy(stays, at - stays, end), after_blank = false;
      size_t used = now.bytes;
      if (flags == kBlank) {
        if (!after_blank) add_blank();
        after_blank = trims_;
      } else if (flags == kReplaced) {
        after_blank = write(texts_.data() + results_[now.code], after_blank, end - at);
      } else {
        after_blank = write(longest({at, size_t(end - at)}, &used), after_blank, end - at);
        if (used != now.bytes) next = read(at + used, end);
      }
      stays = at += used;
    }
    copy(stays, end - stays, end);
  }

  // what stands in place of some characters; whether a blank comes last
  bool write(std::string_view part, bool after_blank, size_t rest) {
    while (after_blank && part.starts_with(' ')) part.remove_prefix(1);
    if (part.empty()) return after_blank;
    reserve(part.size() + rest);
    for (const char byte : part) byte == ' ' ? add_blank() : void(out_[size_++] = byte);
    return trims_ && part.back() == ' ';
  }

  // what stays of a text; `end`: how far it can be read
  void copy(const char* from, size_t bytes, const char* end) {
    constexpr size_t kChunk = 16;  // of most words the only one: cheaper than a call
    if (bytes > kChunk || size_t(end - from) < kChunk) {
      std::memcpy(&out_[size_], from, bytes);
    } else {
      std::memcpy(&out_[size_], from, kChunk);
    }
    size_ += bytes;
  }

  void add_blank() {
    blanks_.push_back(size_);
    if (blank_.size() == 1) return void(out_[size_++] = ' ');
    std::memcpy(&out_[size_], kLowBlock.data(), kLowBlock.size());
    size_ += kLowBlock.size();
  }

  // room for so many bytes, each a blank maybe, and what comes before and after a text
  void reserve(size_t bytes) {
    const size_t wanted = size_ + 3 * bytes + 64;
    if (wanted > out_.size()) out_.resize(wanted + wanted / 2);
  }

  // what the longest sequence at the start of `text`, of `used` bytes, becomes; where there is none a character stays
  std::string_view longest(std::string_view text, size_t* used) const {
    if (symbols_.longest(text, used) >= 0) return text.substr(0, *used);
    *used = character_bytes(text[0]);
    const char* found = nullptr;
    uint32_t node = trie_.empty() ? 0 : offset(trie_[0]);
    for (size_t at = 0, matches = 0; at < text.size() && matches < kMostMatches; ++at) {
      bool has_value;
      if (!step(&node, text[at], &has_value)) break;
      if (has_value) found = result_at(node), *used = at + 1, ++matches;
    }
    return found ? std::string_view(found) : text.substr(0, *used);
  }

  // Darts-clone's units: 31 bits of value, or a label in the low 8 with bit 31, bit 8 "a value is here", an offset above
  static uint32_t offset(uint32_t unit) { return (unit >> 10) << ((unit & 0x200) >> 6); }

  bool step(uint32_t* node, char byte, bool* has_value) const {
    const uint32_t place = *node ^ uint8_t(byte);
    if (place >= trie_.size() || (trie_[place] & 0x800000ffu) != uint8_t(byte)) return false;
    *has_value = trie_[place] & 0x100;
    *node = place ^ offset(trie_[place]);
    return true;
  }

  // what a node with a value stands for: a place in the texts, as `note` has checked
  const char* result_at(uint32_t node) const { return texts_.data() + (trie_[node] & 0x7fffffffu); }

  void read_table(std::string_view table) {
    uint32_t size = 0;
    if (table.size() > 4) std::memcpy(&size, table.data(), 4);
    if (size < 1024 || size % 1024 || size >= table.size() - 4 || table.back()) throw std::invalid_argument("table");
    trie_.resize(size / 4);
    std::memcpy(trie_.data(), table.data() + 4, size);
    texts_ = table.substr(4 + size);
    std::string character;
    std::unordered_map<uint32_t, bool> seen;
    read_sequences(offset(trie_[0]), &character, 0, &seen);
  }

  // Sets the flags of the characters that the table has from a node on, which is reached by a number of characters and
  // the first bytes of another; whether there are any. The table shares nodes: each is looked at once.
  bool read_sequences(uint32_t node, std::string* character, size_t before, std::unordered_map<uint32_t, bool>* seen) {
    bool any = false;
    for (int byte = 1; byte < 256; ++byte) {
      uint32_t child = node;
      bool has_value;
      if (!step(&child, char(byte), &has_value)) continue;
      any = true;
      character->push_back(char(byte));
      if (character->size() < character_bytes(character->front())) {
        if (has_value) throw std::invalid_argument("table: no UTF-8");
        read_sequences(child, character, before, seen);
      } else {
        note(*character, child, has_value, before, seen);
      }
      character->pop_back();
    }
    return any;
  }

  void note(const std::string& character, uint32_t node, bool has_value, size_t before, std::unordered_map<uint32_t, bool>* seen) {
    std::vector<uint32_t> code, result;
    const bool inside = node < trie_.size() && (trie_[node] & 0x7fffffffu) < texts_.size();
    if (!read_characters(character, &code) || (has_value && (!inside || !read_characters(result_at(node), &result))))
      throw std::invalid_argument("table: no UTF-8");
    if (before > kMostMatches) throw std::invalid_argument("table: too deep");
    if (seen->emplace(node, false).second) {
      std::string rest;
      const bool any = read_sequences(node, &rest, before + 1, seen);
      (*seen)[node] = any;
    }
    flags_[code[0]] |= before ? kContinues : (has_value ? kReplaced : 0) | ((*seen)[node] ? kStarts : 0);
    if (!before && has_value) results_[code[0]] = trie_[node] & 0x7fffffffu;
  }

  static constexpr size_t kMostMatches = 32;  // Normalizer::kMaxTrieResultsSize

  const bool trims_, dummy_, suffix_;
  const std::string_view blank_;
  std::vector<uint8_t> flags_;     // by character
  std::vector<uint32_t> results_;  // by character that is replaced alone: place in the texts
  Trie symbols_;
  std::vector<uint32_t> trie_;
  std::string texts_, out_;
  std::vector<size_t> blanks_;
  size_t size_ = 0;
};

}  // namespace megalm::pieces
