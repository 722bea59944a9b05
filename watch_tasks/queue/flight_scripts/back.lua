-- Hand items back before they are settled.
--
-- KEYS  what this holder has in hand
-- ARGV  `these` or `others` (all but these) · RPUSH (head) or LPUSH (tail) · what marks them · numbers …
-- Answer: how many.

local numbers = {}
for at = 4, #ARGV do numbers[#numbers + 1] = ARGV[at] end
if ARGV[1] == 'others' then
  local known, others = {}, {}
  for _, number in ipairs(numbers) do known[number] = true end
  for _, number in ipairs(redis.call('HKEYS', KEYS[1])) do
    if not known[number] and #others < 1000 then others[#others + 1] = number end
  end
  numbers = others
end
return put_back(KEYS[1], numbers, ARGV[2], ARGV[3])
