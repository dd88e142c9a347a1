package main

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"time"
)

// machine is where the figures come from.
type machine struct {
	Date       string `json:"date"`
	Processor  string `json:"processor"`
	Cores      int    `json:"cores"`
	MemoryMiB  int64  `json:"memoryMiB"`
	Kernel     string `json:"kernel"`
	Go         string `json:"go"`
	Kubernetes string `json:"kubernetes"`
	Source     string `json:"source"`
}

func thisMachine(ctx context.Context, root string) machine {
	m := machine{
		Date:      time.Now().UTC().Format(time.DateOnly),
		Processor: valueIn("/proc/cpuinfo", "model name"), Cores: runtime.NumCPU(),
		MemoryMiB: kibibytes(valueIn("/proc/meminfo", "MemTotal")) >> 10, Go: runtime.Version(), Source: "unknown",
	}
	if kernel, err := os.ReadFile("/proc/sys/kernel/osrelease"); err == nil {
		m.Kernel = strings.TrimSpace(string(kernel))
	}
	if source, err := exec.CommandContext(ctx, "git", "-C", root, "describe", "--tags", "--always", "--dirty").Output(); err == nil { //nolint:gosec // a look at this repository
		m.Source = strings.TrimSpace(string(source))
	}
	return m
}

// load is how many processes wanted to run in the minute before.
func load() float64 {
	var one float64
	if text, err := os.ReadFile("/proc/loadavg"); err == nil {
		_, _ = fmt.Sscan(string(text), &one)
	}
	return one
}

// valueIn returns the first value of a key in a file of lines "key: value", empty where it
// is not there.
func valueIn(path, key string) string {
	text, err := os.ReadFile(path) //nolint:gosec // of /proc
	if err != nil {
		return ""
	}
	for line := range strings.Lines(string(text)) {
		if found, value, _ := strings.Cut(line, ":"); strings.TrimSpace(found) == key {
			return strings.TrimSpace(value)
		}
	}
	return ""
}

// kibibytes parses "123 kB".
func kibibytes(value string) int64 {
	number, _, _ := strings.Cut(value, " ")
	n, _ := strconv.ParseInt(number, 10, 64) // zero where there is none
	return n
}

// usage is what a process uses of the machine.
type usage struct {
	CPUSeconds  float64
	ResidentMiB float64
	PeakMiB     float64
}

// ticks converts times of /proc, which are in hundredths of a second, always.
func ticks(fields ...string) (seconds float64) {
	for _, field := range fields {
		n, _ := strconv.ParseFloat(field, 64)
		seconds += n / 100
	}
	return seconds
}

// readStat reads /proc/PID/stat: 123 (name) S parent ...; the times are the 14th and 15th field.
func readStat(path string) (name, state, parent string, cpu float64, err error) {
	text, err := os.ReadFile(path) //nolint:gosec // of /proc
	if err != nil {
		return "", "", "", 0, err
	}
	begin, end := bytes.IndexByte(text, '('), bytes.LastIndexByte(text, ')')
	fields := strings.Fields(string(text[end+1:]))
	return string(text[begin+1 : end]), fields[0], fields[1], ticks(fields[11], fields[12]), nil
}

// usages returns what the processes use that the bench has started, by their names; imps-node
// has its node added, where it has one.
func usages() (map[string]usage, error) {
	stats, err := filepath.Glob("/proc/[0-9]*/stat")
	if err != nil {
		return nil, err
	}
	found := map[string]usage{}
	for _, path := range stats {
		name, state, parent, cpu, err := readStat(path)
		if err != nil || state == "Z" || parent != strconv.Itoa(os.Getpid()) {
			continue // it has just ended, or is not ours
		}
		folder := filepath.Dir(path)
		if name == "imps-node" {
			name = impsName(folder)
		}
		status := filepath.Join(folder, "status")
		found[name] = usage{
			CPUSeconds:  cpu,
			ResidentMiB: float64(kibibytes(valueIn(status, "VmRSS"))) / 1024,
			PeakMiB:     float64(kibibytes(valueIn(status, "VmHWM"))) / 1024,
		}
	}
	return found, nil
}

// What uses CPU besides the processes that the bench has started: the bench itself, and
// everything else on the machine.
const (
	benchItself = "(the bench itself)"
	restOfAll   = "(all else on the machine)"
)

// used returns the CPU time in seconds that each process uses while f runs.
func used(f func() error) (map[string]float64, error) {
	before, err := cpuSeconds()
	if err == nil {
		err = f()
	}
	if err != nil {
		return nil, err
	}
	seconds, err := cpuSeconds()
	for name := range seconds {
		seconds[name] -= before[name]
	}
	return seconds, err
}

func cpuSeconds() (map[string]float64, error) {
	processes, err := usages()
	if err != nil {
		return nil, err
	}
	_, _, _, itself, err := readStat("/proc/self/stat")
	if err != nil {
		return nil, err
	}
	machine, err := os.ReadFile("/proc/stat")
	if err != nil {
		return nil, err
	}
	// cpu user nice system idle iowait irq softirq steal ...
	total := strings.Fields(string(machine))
	rest := ticks(total[1], total[2], total[3], total[6], total[7], total[8]) - itself
	seconds := map[string]float64{benchItself: itself}
	for name, u := range processes {
		seconds[name] = u.CPUSeconds
		rest -= u.CPUSeconds
	}
	seconds[restOfAll] = rest
	return seconds, nil
}

// impsName tells the agents from the coordinator, which has no node.
func impsName(folder string) string {
	environment, err := os.ReadFile(filepath.Join(folder, "environ")) //nolint:gosec // of /proc
	if err != nil {
		return "unknown"
	}
	for variable := range strings.SplitSeq(string(environment), "\x00") {
		if node, ok := strings.CutPrefix(variable, "NODE_NAME="); ok {
			return agentName(node)
		}
	}
	return coordinator
}

func agentName(node string) string { return "agent " + node }
