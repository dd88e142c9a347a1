package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// usage is what a process has of the machine, and what it has used so far.
type usage struct {
	ResidentBytes int64   `json:"residentBytes"`
	PeakBytes     int64   `json:"peakBytes"`
	CPUSeconds    float64 `json:"cpuSeconds"`
	// ReceivedBytes and SentBytes are on the wire: of the agents all connections, of the
	// coordinator everything it reads and writes, which is little else.
	ReceivedBytes int64 `json:"receivedBytes"`
	SentBytes     int64 `json:"sentBytes"`
}

// usages are the processes that a phase is judged by.
type usages struct {
	APIServer   usage `json:"apiServer"`
	Coordinator usage `json:"coordinator"`
	// Agents is the process in which they all are, the simulation's own.
	Agents usage `json:"agents"`
}

// add takes over what is held after a phase, and what was used in it.
func (u *usages) add(after, before usages) {
	u.APIServer = after.APIServer.minus(before.APIServer)
	u.Coordinator = after.Coordinator.minus(before.Coordinator)
	u.Agents = after.Agents.minus(before.Agents)
}

func (u usage) minus(before usage) usage {
	u.CPUSeconds -= before.CPUSeconds
	u.ReceivedBytes -= before.ReceivedBytes
	u.SentBytes -= before.SentBytes
	return u
}

// usageOf reads /proc; resetPeak begins the peak anew afterwards.
// https://docs.kernel.org/filesystems/proc.html
func usageOf(pid int, resetPeak bool) (usage, error) {
	proc := filepath.Join("/proc", strconv.Itoa(pid))
	status, err := fieldsOf(filepath.Join(proc, "status"))
	if err != nil {
		return usage{}, err
	}
	io, err := fieldsOf(filepath.Join(proc, "io"))
	if err != nil {
		return usage{}, err
	}
	stat, err := os.ReadFile(filepath.Join(proc, "stat")) //nolint:gosec // of a process of ours
	if err != nil {
		return usage{}, err
	}
	// What follows the name, which may hold anything: state is the first, utime the 12th.
	fields := strings.Fields(string(stat[strings.LastIndexByte(string(stat), ')')+1:]))
	var ticks float64
	for _, field := range fields[11:13] {
		n, err := strconv.ParseFloat(field, 64)
		if err != nil {
			return usage{}, fmt.Errorf("read the CPU time of process %d: %w", pid, err)
		}
		ticks += n
	}
	const ticksPerSecond = 100 // of every Linux, for /proc
	u := usage{
		ResidentBytes: status["VmRSS"] << 10, PeakBytes: status["VmHWM"] << 10, CPUSeconds: ticks / ticksPerSecond,
		ReceivedBytes: io["rchar"], SentBytes: io["wchar"],
	}
	if resetPeak {
		// Where the kernel refuses, the peak is that of the process's life.
		_ = os.WriteFile(filepath.Join(proc, "clear_refs"), []byte("5"), 0)
	}
	return u, nil
}

// fieldsOf reads lines of a name and a number; lines of anything else are zero.
func fieldsOf(path string) (map[string]int64, error) {
	text, err := os.ReadFile(path) //nolint:gosec // of a process of ours
	if err != nil {
		return nil, err
	}
	fields := map[string]int64{}
	for line := range strings.Lines(string(text)) {
		key, value, _ := strings.Cut(line, ":")
		var n int64
		if _, err := fmt.Sscan(value, &n); err == nil {
			fields[key] = n
		}
	}
	return fields, nil
}

// findProcess returns the process of a program that works in a folder, which is nobody else's.
func findProcess(dir, program string) (int, error) {
	working, err := filepath.Glob("/proc/[0-9]*/cwd")
	if err != nil {
		return 0, err
	}
	for _, link := range working {
		if cwd, err := os.Readlink(link); err != nil || cwd != dir {
			continue // also one that has ended meanwhile
		}
		proc := filepath.Dir(link)
		name, err := os.ReadFile(filepath.Join(proc, "comm")) //nolint:gosec // of a process of ours
		if err == nil && strings.TrimSpace(string(name)) == program {
			return strconv.Atoi(filepath.Base(proc))
		}
	}
	return 0, fmt.Errorf("no %s works in %s", program, dir)
}
