package nodecache

import (
	"os"
	"strconv"
	"strings"
	"time"
)

// instant is a moment by two clocks: the time of day, which can be set, and the time since the machine started, which goes on
// while it is suspended (proc(5), uptime).
type instant struct {
	Wall time.Time     `json:"wall"`
	Boot time.Duration `json:"boot"`
	// BootID tells starts apart.
	BootID string `json:"bootID"`
}

// start is when the machine started, by the time of day.
func (i instant) start() time.Time { return i.Wall.Add(-i.Boot) }

// clock tells the time.
type clock func() (instant, error)

// systemClock is that of the machine.
func systemClock() (instant, error) {
	id, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return instant{}, err
	}
	uptime, err := os.ReadFile("/proc/uptime")
	if err != nil {
		return instant{}, err
	}
	first, _, _ := strings.Cut(string(uptime), " ")
	seconds, err := strconv.ParseFloat(first, 64)
	if err != nil {
		return instant{}, err
	}
	return instant{Wall: time.Now().Round(0), Boot: time.Duration(seconds * float64(time.Second)), BootID: strings.TrimSpace(string(id))}, nil
}

// remaining is how long something that expires is still good, by whichever clock says less; a record of another start of the
// machine goes by the time of day alone. Where the time of day was set back, the time since the start tells.
func remaining(expires time.Time, written, now instant) time.Duration {
	left := expires.Sub(now.Wall)
	if written.BootID == now.BootID {
		left = min(left, expires.Sub(written.Wall)-(now.Boot-written.Boot))
	}
	return left
}
