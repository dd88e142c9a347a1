package main

import (
	"context"
	"debug/buildinfo"
	"encoding/base64"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/imps-node/imps/pkg/dockerconfig"
	"github.com/imps-node/imps/pkg/nodecache"
	"github.com/imps-node/imps/test/fakeaws"
)

// sizeProvider is the size that needs no control plane: imps-credprovider beside the provider that AWS has.
const sizeProvider = "provider"

// The programs.
const (
	emptyProgram = "empty"
	peakProgram  = "peak"
	impsProvider = "imps-credprovider"
	ecrProvider  = "ecr-credential-provider"
)

// latencies are what the API of ECR adds to each call.
var latencies = []time.Duration{0, 5 * time.Millisecond, 30 * time.Millisecond}

const (
	// pulls are how many repositories of one registry are asked for at once, on a node that is new.
	pulls = 100
	// bursts are how often that is.
	bursts = 5
	// peaks are how often the memory of each answer is measured.
	peaks = 10
	// rarely is how many rounds lie between two questions that imps takes its time for.
	rarely = 20
)

// The answers that goals are about.
const (
	answerHit = "imps: hit, Node, " + setOne
	// answerWaits takes long: the agent may still be about to write.
	answerWaits = "imps: unknown, waits for the agent, Namespace"
)

// The sets of records.
const (
	setOne   = "1 record"
	setMany  = "1,000 records"
	setGlobs = "1,000 globs"
	setShape = "1,000 globs of one shape"
)

const (
	ecrRegion = "eu-central-1"
	ecrHost   = "123456789012.dkr.ecr." + ecrRegion + ".amazonaws.com"
	// ecrGlob matches ecrHost, and not otherHost, for which it has to be looked at.
	ecrGlob   = "1234*.dkr.ecr." + ecrRegion + ".amazonaws.com"
	otherHost = "210987654321.dkr.ecr." + ecrRegion + ".amazonaws.com"
)

// The namespaces: one with as many records as there are, one that has nothing for certain, and one that nobody has dealt with.
const (
	namespaceFull  = "full"
	namespaceEmpty = "empty"
	namespaceNew   = "new"
)

// providerRun is what was measured of the providers.
type providerRun struct {
	// Beside is the module and version of ecr-credential-provider.
	Beside  string    `json:"beside"`
	Answers []answers `json:"answers"`
	Bursts  []burst   `json:"bursts"`
	// BinaryMB are the sizes of the programs, in millions of bytes.
	BinaryMB map[string]float64 `json:"binaryMB"`
}

// answers is what became of a question.
type answers struct {
	Name string `json:"name"`
	// Times are from the start of the process to its end, with the whole answer read.
	Times latency `json:"milliseconds"`
	// CPU is user and system time of the process.
	CPU latency `json:"cpuMilliseconds"`
	// PeakMiB is the greatest peak of its memory.
	PeakMiB float64 `json:"peakMiB"`
}

// burst is what became of many questions at once.
type burst struct {
	Name string `json:"name"`
	// Calls are the greatest number of calls to AWS in one burst.
	Calls int `json:"calls"`
	// Times are from the first start to the last end, for each burst.
	Times latency `json:"milliseconds"`
}

// answer returns what became of a question, nothing where it was not asked.
func (r *providerRun) answer(name string) answers {
	for _, a := range r.Answers {
		if a.Name == name {
			return a
		}
	}
	return answers{}
}

// most returns the greatest of the figures of the questions that a predicate picks.
func (r *providerRun) most(which func(name string) bool, of func(answers) float64) (most float64) {
	for _, a := range r.Answers {
		if which(a.Name) {
			most = max(most, of(a))
		}
	}
	return most
}

// burst returns what became of many questions at once, nothing where there were none.
func (r *providerRun) burst(name string) burst {
	for _, b := range r.Bursts {
		if b.Name == name {
			return b
		}
	}
	return burst{}
}

// providers are the programs, and what they need to answer.
type providers struct {
	bin    string // folder of the programs
	caches string // folder of node caches
	aws    *fakeaws.Server
	// token is the credential for ecrHost in the node caches.
	token string
}

// measureProvider measures one run of the providers.
func (b *bench) measureProvider(ctx context.Context) (err error) {
	b.run = sizeRun{Size: b.size.name, Load: load(), Provider: &providerRun{}}
	p := providers{aws: fakeaws.New(), token: base64.StdEncoding.EncodeToString(randomBytes(1329))} // as long as one of ECR
	defer func() { err = errors.Join(err, p.removeFolders()) }()
	if err := p.makeFolders(); err != nil {
		return err
	}
	b.say("building the providers")
	if err := p.build(ctx, b.root, b.run.Provider); err != nil {
		return err
	}

	questions, alive, err := p.imps()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, alive.Close()) }()
	beside, stop, err := p.ecr()
	if err != nil {
		return err
	}
	defer stop()
	// In a burst, both are asked what they know.
	cold := append([]question{questions[0]}, beside...)
	questions = slices.Concat([]question{{
		name: "floor: an empty program", command: []string{filepath.Join(p.bin, emptyProgram)}, check: silent, every: 1,
	}}, questions, beside)

	b.say("asking %d questions %d times, in turns", len(questions), b.settings.answers)
	if b.run.Provider.Answers, err = askInTurns(ctx, questions, b.settings.answers); err != nil {
		return err
	}
	b.say("measuring memory")
	for i, q := range questions {
		for range min(peaks, b.settings.answers) {
			peak, err := q.peak(ctx, filepath.Join(p.bin, peakProgram))
			if err != nil {
				return err
			}
			b.run.Provider.Answers[i].PeakMiB = max(b.run.Provider.Answers[i].PeakMiB, peak)
		}
	}
	b.say("asking for %d repositories at once", pulls)
	b.run.Provider.Bursts, err = p.burst(ctx, cold, min(bursts, b.settings.answers))
	return err
}

func (p *providers) makeFolders() (err error) {
	// A node cache is on a tmpfs.
	if p.caches, err = os.MkdirTemp("/dev/shm", fmt.Sprintf("imps-bench-%d-", os.Getpid())); err != nil {
		return fmt.Errorf("create a folder: %w", err)
	}
	if p.bin, err = os.MkdirTemp("", "imps-bench-"); err != nil {
		return fmt.Errorf("create a folder: %w", err)
	}
	return nil
}

func (p *providers) removeFolders() error {
	return errors.Join(os.RemoveAll(p.caches), os.RemoveAll(p.bin))
}

// build builds the programs, and notes their sizes.
func (p *providers) build(ctx context.Context, root string, r *providerRun) error {
	r.BinaryMB = map[string]float64{}
	for name, source := range map[string]struct{ folder, pkg string }{
		emptyProgram: {root, "./test/bench/empty"},
		peakProgram:  {root, "./test/bench/peak"},
		impsProvider: {root, "./cmd/imps-credprovider"},
		ecrProvider:  {filepath.Join(root, "test/bench/ecr-credential-provider"), "k8s.io/cloud-provider-aws/cmd/ecr-credential-provider"},
	} {
		binary := filepath.Join(p.bin, name)
		if err := compile(ctx, source.folder, source.pkg, binary); err != nil {
			return err
		}
		info, err := os.Stat(binary)
		if err != nil {
			return fmt.Errorf("look at %s: %w", name, err)
		}
		if name != peakProgram {
			r.BinaryMB[name] = float64(info.Size()) / 1e6
		}
	}
	info, err := buildinfo.ReadFile(filepath.Join(p.bin, ecrProvider))
	if err != nil {
		return fmt.Errorf("read the version: %w", err)
	}
	r.Beside = info.Main.Path + " " + info.Main.Version
	return nil
}

// imps returns the questions to imps, and a node cache that has a writer as long as it is open.
func (p *providers) imps() (questions []question, alive *nodecache.Writer, err error) {
	add := func(name, dir string, scope nodecache.Scope, host string, check func([]byte) error, every int) error {
		request, err := requestFor(host+"/team/app", scope.Namespace)
		flag := "--scope=Node"
		if scope != nodecache.Node {
			flag = "--scope=Namespace"
		}
		questions = append(questions, question{
			name: name, command: []string{filepath.Join(p.bin, impsProvider), flag, "--cache-dir=" + dir}, request: request, check: check, every: every,
		})
		return err
	}
	full := nodecache.InNamespace(namespaceFull)
	ours := hit(func(_, password string) bool { return password == p.token })
	for _, set := range recordSets() {
		entries := p.entries(set.keys)
		known, unknown := filepath.Join(p.caches, "known", set.name), filepath.Join(p.caches, "unknown", set.name)
		if err := errors.Join(
			write(known, map[nodecache.Scope][]nodecache.Entry{nodecache.Node: entries, full: entries, nodecache.InNamespace(namespaceEmpty): nil}),
			write(unknown, map[nodecache.Scope][]nodecache.Entry{full: entries}),
			add("imps: hit, Node, "+set.name, known, nodecache.Node, ecrHost, ours, 1),
			add("imps: hit, Namespace, "+set.name, known, full, ecrHost, ours, 1),
			add("imps: known miss, Node, "+set.name, known, nodecache.Node, otherHost, empty, 1),
			add("imps: known miss, Namespace, "+set.name, known, nodecache.InNamespace(namespaceEmpty), ecrHost, empty, 1),
			add("imps: unknown, no agent, Node, "+set.name, unknown, nodecache.Node, ecrHost, empty, 1),
			add("imps: unknown, no agent, Namespace, "+set.name, unknown, nodecache.InNamespace(namespaceNew), ecrHost, empty, 1),
		); err != nil {
			return nil, nil, err
		}
	}
	dir := filepath.Join(p.caches, "alive")
	if err := add(answerWaits, dir, nodecache.InNamespace(namespaceNew), ecrHost, empty, rarely); err != nil {
		return nil, nil, err
	}
	alive, err = nodecache.Open(dir)
	return questions, alive, err
}

// recordSet is what a node cache holds.
type recordSet struct {
	name string
	keys []string
}

// recordSets all have exactly one key for ecrHost, the last, and none for otherHost.
func recordSets() []recordSet {
	const others = 999
	var literals, globs, shape []string
	for i := range others {
		literals = append(literals, fmt.Sprintf("registry-%03d.team.example", i))
		globs = append(globs, fmt.Sprintf("*.dkr.ecr.region-%03d.amazonaws.com", i))
		// They differ in the label that is a glob, so that all have to be looked at.
		shape = append(shape, fmt.Sprintf("9%03d*.dkr.ecr.%s.amazonaws.com", i, ecrRegion))
	}
	return []recordSet{
		{setOne, []string{ecrHost}},
		{setMany, append(literals, ecrHost)},
		{setGlobs, append(globs, ecrGlob)},
		{setShape, append(shape, ecrGlob)},
	}
}

// entries are records for the keys; the last has the token.
func (p *providers) entries(keys []string) []nodecache.Entry {
	entries := make([]nodecache.Entry, 0, len(keys))
	for _, key := range keys {
		entries = append(entries, nodecache.Entry{
			Key: key, Username: dockerconfig.NewSensitive("robot"), Password: dockerconfig.NewSensitive(base64.StdEncoding.EncodeToString(randomBytes(24))),
		})
	}
	last := &entries[len(entries)-1]
	last.Username, last.Password, last.Expires = dockerconfig.NewSensitive("AWS"), dockerconfig.NewSensitive(p.token), time.Now().Add(12*time.Hour)
	return entries
}

// write makes a node cache, and leaves it without an agent.
func write(dir string, scopes map[nodecache.Scope][]nodecache.Entry) error {
	writer, err := nodecache.Open(dir)
	if err != nil {
		return err
	}
	for scope, entries := range scopes {
		skipped, err := writer.Set(scope, entries)
		if skipped > 0 {
			err = errors.Join(err, fmt.Errorf("%d entries are not written", skipped))
		}
		if err != nil {
			return errors.Join(fmt.Errorf("write a node cache: %w", err), writer.Close())
		}
	}
	return writer.Close()
}

// ecr returns the questions to ecr-credential-provider, one for each latency, and what ends the servers that it asks.
func (p *providers) ecr() (questions []question, stop func(), err error) {
	key := fakeaws.Key{AccessKeyID: "AKIABENCH", SecretAccessKey: "bench", Principal: "arn:aws:sts::123456789012:assumed-role/node/i-1"}
	p.aws.AddKey(key)
	request, err := requestFor(ecrHost+"/team/app", "")
	if err != nil {
		return nil, nil, err
	}
	var servers []*httptest.Server
	for _, latency := range latencies {
		server := p.serve(latency)
		servers = append(servers, server)
		questions = append(questions, question{
			name:    besideName(latency),
			command: []string{filepath.Join(p.bin, ecrProvider)},
			env:     awsEnv(key, server.URL),
			request: request, every: 1,
			check: hit(func(username, password string) bool { return p.aws.Opens(ecrRegion, false, username, password) }),
		})
	}
	return questions, func() {
		for _, server := range servers {
			server.Close()
		}
	}, nil
}

// serve serves an AWS with a latency.
func (p *providers) serve(latency time.Duration) *httptest.Server {
	return httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if latency == 0 || pause(r.Context(), latency) == nil {
			p.aws.ServeHTTP(w, r)
		}
	}))
}

// awsEnv has a program find it.
func awsEnv(key fakeaws.Key, url string) []string {
	return []string{
		"AWS_ACCESS_KEY_ID=" + key.AccessKeyID, "AWS_SECRET_ACCESS_KEY=" + key.SecretAccessKey,
		"AWS_ENDPOINT_URL_ECR=" + url, "AWS_EC2_METADATA_DISABLED=true",
	}
}

func besideName(latency time.Duration) string {
	return fmt.Sprintf("ecr-credential-provider: hit, API + %d ms", latency.Milliseconds())
}

// askInTurns asks every question once in each round, in an order that is new each time, so that whatever disturbs one disturbs all.
// One more round at the beginning does not count.
func askInTurns(ctx context.Context, questions []question, rounds int) ([]answers, error) {
	times, cpu := make([][]time.Duration, len(questions)), make([][]time.Duration, len(questions))
	for round := range rounds + 1 {
		for _, i := range rand.Perm(len(questions)) { //nolint:gosec // an order, not a secret
			if q := questions[i]; round%min(q.every, rounds) == 0 {
				took, used, err := q.ask(ctx)
				if err != nil {
					return nil, err
				}
				if round > 0 {
					times[i], cpu[i] = append(times[i], took), append(cpu[i], used)
				}
			}
		}
	}
	all := make([]answers, 0, len(questions))
	for i, q := range questions {
		all = append(all, answers{Name: q.name, Times: latencyOf(times[i]), CPU: latencyOf(cpu[i])})
	}
	return all, nil
}

// burst asks each question for many repositories at once, in turns.
func (p *providers) burst(ctx context.Context, questions []question, rounds int) ([]burst, error) {
	all, times := make([]burst, len(questions)), make([][]time.Duration, len(questions))
	repositories, requests := names("repository", pulls), map[string][]byte{}
	for _, repository := range repositories {
		var err error
		if requests[repository], err = requestFor(ecrHost+"/"+repository, ""); err != nil {
			return nil, err
		}
	}
	for range rounds {
		for i, q := range questions {
			p.aws.Calls() // which forgets those before
			begin := time.Now()
			if _, err := callAll(ctx, repositories, 0, 0, func(ctx context.Context, repository string) error {
				single := q
				single.request = requests[repository]
				_, _, err := single.ask(ctx)
				return err
			}); err != nil {
				return nil, err
			}
			times[i] = append(times[i], time.Since(begin))
			all[i].Calls = max(all[i].Calls, len(p.aws.Calls()))
		}
	}
	for i, q := range questions {
		all[i].Name, all[i].Times = q.name, latencyOf(times[i])
	}
	return all, nil
}
