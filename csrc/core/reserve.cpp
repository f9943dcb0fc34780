// What fits beside the reserve, and the sentence for what does not.
#include "core/reserve.h"

#include <algorithm>
#include <iomanip>
#include <locale>
#include <sstream>

namespace egm {
namespace {

std::string in_words(Bytes size) {
  std::ostringstream text;
  text.imbue(std::locale::classic());
  text << std::fixed << std::setprecision(2) << size.in_gib() << " GiB";
  return text.str();
}

std::string elsewhere(const ReserveQuestion& question) {
  const Bytes nothing(0);
  if (question.promised_elsewhere == nothing && question.pending_elsewhere == nothing) return "";
  return ", " + in_words(question.promised_elsewhere) + " to managed memory and " +
         in_words(question.pending_elsewhere) + " to requests of other processes";
}

}  // namespace

std::optional<std::string> over_reserve(const ReserveQuestion& question) {
  // What is still needed once all that is available is used up. Part by part, because the sum of
  // the parts may not fit a number.
  Bytes left = question.host.available;
  Bytes missing;
  for (const Bytes part :
       {question.reserve, question.promised, question.pending, question.promised_elsewhere,
        question.pending_elsewhere, question.asked}) {
    missing = saturated_sum(missing, difference_or_zero(part, left));
    left = difference_or_zero(left, part);
  }
  if (missing == Bytes(0)) return std::nullopt;
  return in_words(question.asked) + " (" + std::to_string(question.asked.count()) +
         " bytes) of host memory would cut into the reserve of " + in_words(question.reserve) +
         " that must stay free: of " + in_words(question.host.total) + ", " +
         in_words(question.host.available) + " can be taken (limited by " +
         question.host.limited_by + "); " + in_words(question.promised) +
         " of that is promised to managed memory that is not populated yet and " +
         in_words(question.pending) + " to requests under way" + elsewhere(question) +
         ", so that " + in_words(missing) + " (" + std::to_string(missing.count()) +
         " bytes) are missing. Lower host_reserve_gib (EGM_ALLOC_HOST_RESERVE_GIB), free tensors "
         "or call torch.cuda.empty_cache().";
}

Bytes default_reserve(Bytes total) { return Bytes(total.count() / 20); }

Bytes hbm_of_others(Bytes of_others, const HbmUse& before, const HbmUse& now) {
  const auto most = [](const HbmUse& hbm) {
    return difference_or_zero(difference_or_zero(hbm.total, hbm.free), hbm.of_torch);
  };
  const Bytes of_managed = difference_or_zero(before.managed, now.managed);
  const Bytes given_back =
      difference_or_zero(difference_or_zero(most(before), most(now)), of_managed);
  const Bytes least = difference_or_zero(most(now), now.managed);
  return std::min(most(now), std::max(least, difference_or_zero(of_others, given_back)));
}

Bytes promised_to_host(Bytes bound_for_host, Bytes other_off_host, const HbmUse& hbm,
                       Bytes of_others) {
  const Bytes room = difference_or_zero(hbm.total, saturated_sum(hbm.of_torch, of_others));
  return saturated_sum(bound_for_host, difference_or_zero(other_off_host, room));
}

}  // namespace egm
