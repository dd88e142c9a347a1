package main

import (
	"os"
	"os/signal"
	"runtime"
	"runtime/pprof"
	"syscall"
)

// init has the process write profiles: SIGUSR1 begins one of the CPU, SIGUSR2 ends it and
// writes the heap too. Only the bench builds with this file.
func init() {
	path := os.Getenv("BENCH_PROFILE")
	if path == "" {
		return
	}
	runtime.MemProfileRate = 4 << 10 // bytes; the default tells little of so small a heap
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, syscall.SIGUSR1, syscall.SIGUSR2)
	go func() {
		var cpu *os.File
		for s := range signals {
			if s == syscall.SIGUSR1 {
				cpu = must(os.Create(path + ".cpu.part"))
				runtime.SetCPUProfileRate(250) // which stays, but for a warning in the log
				check(pprof.StartCPUProfile(cpu))
				continue
			}
			pprof.StopCPUProfile()
			check(cpu.Close())
			runtime.GC()
			heap := must(os.Create(path + ".heap.part"))
			check(pprof.Lookup("heap").WriteTo(heap, 0))
			check(heap.Close())
			check(os.Rename(path+".cpu.part", path+".cpu"))
			check(os.Rename(path+".heap.part", path+".heap"))
		}
	}()
}

func must(f *os.File, err error) *os.File {
	check(err)
	return f
}

func check(err error) {
	if err != nil {
		panic(err)
	}
}
