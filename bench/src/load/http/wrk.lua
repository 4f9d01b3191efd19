-- Prints what was counted, and each latency in microseconds with its count. wrk calls `done` after
-- the load has ended.
done = function(summary, latency, requests)
  local errors = summary.errors
  print(string.format("summary %d %d %d %d", summary.duration, summary.requests, summary.bytes,
    errors.connect + errors.read + errors.write + errors.status + errors.timeout))
  for index = 1, #latency do
    local us, count = latency(index)
    print(string.format("latency %d %d", us, count))
  end
end
