package sync

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/watch"
)

// memory is a list-watch of ConfigMaps in memory. What it does not simulate, no test here
// is about: it knows no history, and its watch is what the test sends.
type memory struct {
	mu      sync.Mutex
	objects map[string]*corev1.ConfigMap
	version int
	// streams: it can send its list as a watch.
	streams bool
	// listErr and watchErr are the answers, where they are not nil.
	listErr, watchErr error
	lists, watches    int
	watcher           *watch.FakeWatcher
}

func newMemory(streams bool, objects ...*corev1.ConfigMap) *memory {
	m := &memory{objects: map[string]*corev1.ConfigMap{}, streams: streams, version: 1}
	for _, o := range objects {
		m.objects[o.Name] = o
	}
	return m
}

func (m *memory) ListWithContext(context.Context, metav1.ListOptions) (runtime.Object, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.lists++
	if m.listErr != nil {
		return nil, m.listErr
	}
	list := &corev1.ConfigMapList{ListMeta: metav1.ListMeta{ResourceVersion: strconv.Itoa(m.version)}}
	for _, name := range slices.Sorted(maps.Keys(m.objects)) {
		list.Items = append(list.Items, *m.objects[name])
	}
	return list, nil
}

func (m *memory) WatchWithContext(_ context.Context, options metav1.ListOptions) (watch.Interface, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.watches++
	if m.watchErr != nil {
		return nil, m.watchErr
	}
	if options.SendInitialEvents == nil {
		m.watcher = watch.NewFake()
		return m.watcher, nil
	}
	if !m.streams {
		return nil, apierrors.NewBadRequest("sendInitialEvents is forbidden for watch")
	}
	m.watcher = watch.NewFakeWithChanSize(len(m.objects)+1, false)
	for _, name := range slices.Sorted(maps.Keys(m.objects)) {
		m.watcher.Add(m.objects[name])
	}
	m.watcher.Action(watch.Bookmark, &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{
		ResourceVersion: strconv.Itoa(m.version), Annotations: map[string]string{metav1.InitialEventsAnnotationKey: "true"},
	}})
	return m.watcher, nil
}

func (m *memory) List(o metav1.ListOptions) (runtime.Object, error) {
	return m.ListWithContext(context.Background(), o)
}

func (m *memory) Watch(o metav1.ListOptions) (watch.Interface, error) {
	return m.WatchWithContext(context.Background(), o)
}

// fail sets the answers from now on.
func (m *memory) fail(list, watch error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.listErr, m.watchErr = list, watch
}

// set replaces the objects without an event.
func (m *memory) set(objects ...*corev1.ConfigMap) {
	m.mu.Lock()
	defer m.mu.Unlock()
	clear(m.objects)
	for _, o := range objects {
		m.objects[o.Name] = o
	}
}

// breakWatch ends the watch with an error, after which a reflector lists anew.
func (m *memory) breakWatch() {
	m.mu.Lock()
	w := m.watcher
	m.mu.Unlock()
	expired := apierrors.NewResourceExpired("too old").Status()
	w.Error(&expired)
}

// thing is a ConfigMap at a resourceVersion.
func thing(name string, version int) *corev1.ConfigMap {
	return &corev1.ConfigMap{
		ObjectMeta: metav1.ObjectMeta{Namespace: "n", Name: name, ResourceVersion: strconv.Itoa(version)},
		Data:       map[string]string{"secret": canary},
	}
}

func thingKey(name string) types.NamespacedName {
	return types.NamespacedName{Namespace: "n", Name: name}
}

// mirrored is a Mirror of resourceVersions, with what it told.
type mirrored struct {
	*Mirror[int]
	server *memory
	mu     sync.Mutex
	// events are "<name> <old>><new>", where "-" is nothing.
	events []string
	errs   []error
	log    bytes.Buffer
	// stop ends Run and waits for it.
	stop func()
}

// watchIn runs a Mirror in a synctest bubble.
func watchIn(t *testing.T, server *memory, ordered bool) *mirrored {
	t.Helper()
	m := &mirrored{server: server}
	version := func(p *int) string {
		if p == nil {
			return "-"
		}
		return strconv.Itoa(*p)
	}
	config := MirrorConfig[int]{
		Name: "things", ListWatch: server, Example: &corev1.ConfigMap{},
		Log: slog.New(slog.NewTextHandler(&m.log, &slog.HandlerOptions{Level: slog.LevelDebug})),
		Convert: func(o runtime.Object) int {
			v, err := strconv.Atoi(o.(*corev1.ConfigMap).ResourceVersion)
			require.NoError(t, err)
			return v
		},
		OnChange: func(key types.NamespacedName, old, current *int) {
			// The Mirror has changed by now, and may be asked.
			got, there := m.Get(key)
			require.Equal(t, current != nil, there)
			if current != nil {
				require.Equal(t, *current, got)
			}
			m.mu.Lock()
			defer m.mu.Unlock()
			m.events = append(m.events, fmt.Sprintf("%s %s>%s", key.Name, version(old), version(current)))
		},
		OnError: func(err error) {
			m.mu.Lock()
			defer m.mu.Unlock()
			m.errs = append(m.errs, err)
		},
	}
	if ordered {
		config.Version = strconv.Itoa
	}
	m.Mirror = NewMirror(config)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		m.Run(ctx)
	}()
	m.stop = func() {
		cancel()
		<-done
	}
	t.Cleanup(m.stop)
	synctest.Wait()
	return m
}

// told returns the events since the last call.
func (m *mirrored) told() []string {
	synctest.Wait()
	m.mu.Lock()
	defer m.mu.Unlock()
	events := m.events
	m.events = nil
	return events
}

func (m *mirrored) isSynced() bool {
	select {
	case <-m.Synced():
		return true
	default:
		return false
	}
}

func (m *mirrored) content() map[string]int {
	content := map[string]int{}
	m.Range(func(key types.NamespacedName, version int) bool {
		content[key.Name] = version
		return true
	})
	return content
}

// elapse lets time pass in a synctest bubble, and everything happen that happens until then.
func elapse(d time.Duration) {
	time.Sleep(d) //nolint:forbidigo // fake time
	synctest.Wait()
}

// both runs a test on a server that streams its list and on one that does not.
func both(t *testing.T, test func(t *testing.T, streams bool)) {
	t.Helper()
	for _, streams := range []bool{true, false} {
		t.Run(fmt.Sprintf("streams=%v", streams), func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) { test(t, streams) })
		})
	}
}

func TestMirrorKeepsWhatTheServerHasAndTellsEveryEventInOrder(t *testing.T) {
	t.Parallel()
	both(t, func(t *testing.T, streams bool) {
		m := watchIn(t, newMemory(streams, thing("a", 1), thing("b", 2)), false)
		require.True(t, m.isSynced())
		require.ElementsMatch(t, []string{"a ->1", "b ->2"}, m.told())
		require.Equal(t, map[string]int{"a": 1, "b": 2}, m.content())
		require.Equal(t, 2, m.Len())

		w := m.server.watcher
		w.Add(thing("c", 3))
		w.Modify(thing("a", 4))
		w.Modify(thing("a", 5))
		w.Delete(thing("b", 6))
		w.Add(thing("b", 7))
		w.Delete(thing("c", 8))
		require.Equal(t, []string{"c ->3", "a 1>4", "a 4>5", "b 2>-", "b ->7", "c 3>-"}, m.told())
		require.Equal(t, map[string]int{"a": 5, "b": 7}, m.content())
		_, there := m.Get(thingKey("c"))
		require.False(t, there)
		version, there := m.Get(thingKey("a"))
		require.True(t, there)
		require.Equal(t, 5, version)
		require.Empty(t, m.errs)
		require.Empty(t, m.log.String(), "what works is silent")
		require.Equal(t, streams, m.server.lists == 0, "where the server streams its list, no other is asked for")
	})
}

func TestMirrorOfNothingIsSynced(t *testing.T) {
	t.Parallel()
	both(t, func(t *testing.T, streams bool) {
		m := watchIn(t, newMemory(streams), false)
		require.True(t, m.isSynced())
		require.Zero(t, m.Len())
		require.Empty(t, m.told())
	})
}

func TestMirrorIsSyncedOnceTheFirstListIsToldAndStaysSo(t *testing.T) {
	t.Parallel()
	m := NewMirror(MirrorConfig[int]{Name: "things", Convert: func(runtime.Object) int { return 1 }})
	isSynced := func() bool {
		select {
		case <-m.Synced():
			return true
		default:
			return false
		}
	}
	told := 0
	m.config.OnChange = func(types.NamespacedName, *int, *int) {
		told++
		require.False(t, isSynced(), "who waits for Synced finds everything told")
	}
	require.False(t, isSynced())
	require.NoError(t, m.upsert(thing("early", 1)))
	require.False(t, isSynced())
	require.NoError(t, m.replace([]any{thing("a", 1), thing("b", 1)}, "1"))
	require.True(t, isSynced())
	require.Equal(t, 4, told, "one that came early, two that are there, one that is not")

	m.config.OnChange = nil
	require.NoError(t, m.replace(nil, "1"))
	require.NoError(t, m.replace([]any{thing("a", 1)}, "1"))
	require.True(t, isSynced())
	require.Equal(t, 1, m.Len())
}

func TestMirrorFindsOutWhatHappenedWhileItsWatchWasBroken(t *testing.T) {
	t.Parallel()
	both(t, func(t *testing.T, streams bool) {
		m := watchIn(t, newMemory(streams, thing("a", 1), thing("b", 2), thing("c", 3)), true)
		m.told()
		m.server.set(thing("a", 1), thing("c", 10), thing("d", 11))
		m.server.breakWatch()
		elapse(time.Minute)
		require.ElementsMatch(t, []string{"a 1>1", "b 2>-", "c 3>10", "d ->11"}, m.told())
		require.Equal(t, map[string]int{"a": 1, "c": 10, "d": 11}, m.content())
		require.True(t, m.isSynced())
		require.NoError(t, m.Err())
		require.Empty(t, m.errs)
	})
}

func TestPutIsKnownAtOnceAndToldToNobody(t *testing.T) {
	t.Parallel()
	both(t, func(t *testing.T, streams bool) {
		m := watchIn(t, newMemory(streams, thing("a", 1)), true)
		m.told()
		w := m.server.watcher
		m.Put(thingKey("a"), 5)
		m.Put(thingKey("b"), 6)
		require.Equal(t, map[string]int{"a": 5, "b": 6}, m.content())
		require.Empty(t, m.told())

		w.Modify(thing("a", 4))
		require.Empty(t, m.told(), "an older event")
		w.Modify(thing("a", 5))
		w.Add(thing("b", 6))
		require.Equal(t, []string{"a 5>5", "b 6>6"}, m.told(), "the write's own event")
		w.Modify(thing("a", 7))
		require.Equal(t, []string{"a 5>7"}, m.told(), "a newer event")
		m.Put(thingKey("a"), 6)
		require.Equal(t, map[string]int{"a": 7, "b": 6}, m.content(), "an answer that the watch has overtaken")
	})
}

// A write is answered whenever it is, also while a list is being told.
func TestPutAndAListAtTheSameTime(t *testing.T) {
	t.Parallel()
	var things []*corev1.ConfigMap
	for i := range 50 {
		things = append(things, thing(strconv.Itoa(i), 1))
	}
	var m *Mirror[string]
	begin, stop := make(chan struct{}), make(chan struct{})
	m = NewMirror(MirrorConfig[string]{
		Name: "things", ListWatch: newMemory(false, things...), Example: &corev1.ConfigMap{}, Log: slog.New(slog.DiscardHandler),
		Convert: func(o runtime.Object) string { return o.(*corev1.ConfigMap).Name },
		OnChange: func(types.NamespacedName, *string, *string) {
			select {
			case <-begin:
			default:
				close(begin)
			}
		},
	})
	var running sync.WaitGroup
	defer running.Wait()
	running.Go(func() {
		<-begin
		for i := 0; ; i++ {
			select {
			case <-stop:
				return
			default:
				m.Put(thingKey("put-"+strconv.Itoa(i%100)), "x")
			}
		}
	})
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	running.Go(func() { m.Run(ctx) })
	<-m.Synced()
	close(stop)
}

func TestPutDoesNotBringBackWhatHasGoneMeanwhile(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		m := watchIn(t, newMemory(false), true)
		defer m.stop()
		synctest.Wait()
		m.server.watcher.Add(thing("a", 5))
		m.server.watcher.Delete(thing("a", 7))
		synctest.Wait()
		m.Put(thingKey("a"), 5)
		_, there := m.Get(thingKey("a"))
		require.False(t, there, "the answer to the write came later than its end")
		m.Put(thingKey("b"), 8)
		_, there = m.Get(thingKey("b"))
		require.True(t, there)
	})
}

func TestPutDoesNotBringBackWhatAListDoesNotHave(t *testing.T) {
	t.Parallel()
	both(t, func(t *testing.T, streams bool) {
		m := watchIn(t, newMemory(streams), true)
		m.server.set() // created at 100 and deleted at 120, while the watch was away
		m.server.version = 150
		m.server.breakWatch()
		elapse(time.Minute)
		m.Put(thingKey("a"), 100)
		require.Empty(t, m.content())
		m.Put(thingKey("a"), 151)
		require.Equal(t, map[string]int{"a": 151}, m.content())
	})
}

func TestALateDeletionOfAnEarlierIncarnationIsIgnored(t *testing.T) {
	t.Parallel()
	both(t, func(t *testing.T, streams bool) {
		m := watchIn(t, newMemory(streams, thing("a", 1)), true)
		m.told()
		m.Put(thingKey("a"), 9) // deleted at 8 and created anew
		m.server.watcher.Delete(thing("a", 8))
		require.Empty(t, m.told())
		require.Equal(t, map[string]int{"a": 9}, m.content())
		m.server.watcher.Delete(thing("a", 10))
		require.Equal(t, []string{"a 9>-"}, m.told())
	})
}

func TestWithoutAnOrderTheLastEventCounts(t *testing.T) {
	t.Parallel()
	both(t, func(t *testing.T, streams bool) {
		m := watchIn(t, newMemory(streams, thing("a", 5)), false)
		m.told()
		m.server.watcher.Modify(thing("a", 4))
		m.server.watcher.Delete(thing("a", 3))
		require.Equal(t, []string{"a 5>4", "a 4>-"}, m.told())
	})
}

func TestDropForgetsOnlyTheStateThatWasDeleted(t *testing.T) {
	t.Parallel()
	both(t, func(t *testing.T, streams bool) {
		m := watchIn(t, newMemory(streams, thing("a", 1), thing("b", 2)), true)
		m.told()
		is := func(version int) func(int) bool { return func(v int) bool { return v == version } }
		m.Drop(thingKey("a"), is(1))
		m.Drop(thingKey("b"), is(1))
		m.Drop(thingKey("absent"), is(0))
		require.Equal(t, map[string]int{"b": 2}, m.content())
		require.Empty(t, m.told())
		m.server.watcher.Delete(thing("a", 3))
		require.Empty(t, m.told(), "it is known already")
	})
}

func TestRangeStopsWhenItIsTold(t *testing.T) {
	t.Parallel()
	m := NewMirror(MirrorConfig[int]{})
	m.Put(thingKey("a"), 1)
	m.Put(thingKey("b"), 1)
	seen := 0
	m.Range(func(types.NamespacedName, int) bool { seen++; return false })
	require.Equal(t, 1, seen)
}

// Also where its versions are older, as after a restore of etcd: else the Mirror would
// never be right again.
func TestAListIsTheTruthWhateverWasKnown(t *testing.T) {
	t.Parallel()
	both(t, func(t *testing.T, streams bool) {
		m := watchIn(t, newMemory(streams, thing("a", 90), thing("b", 91)), true)
		m.told()
		m.server.set(thing("a", 5), thing("c", 6))
		m.server.breakWatch()
		elapse(time.Minute)
		require.ElementsMatch(t, []string{"a 90>5", "b 91>-", "c ->6"}, m.told())
		m.server.watcher.Modify(thing("a", 7))
		require.Equal(t, []string{"a 5>7"}, m.told())
	})
}

func TestErrorsAreToldWhenTheyBeginAndEnd(t *testing.T) {
	t.Parallel()
	both(t, func(t *testing.T, streams bool) {
		forbidden := apierrors.NewForbidden(secrets, "pull", errors.New("no"))
		server := newMemory(streams, thing("a", 1))
		server.fail(forbidden, forbidden)
		m := watchIn(t, server, false)
		elapse(10 * time.Minute)
		require.False(t, m.isSynced())
		require.ErrorIs(t, m.Err(), forbidden)
		require.Equal(t, []error{forbidden}, m.errs)
		require.Greater(t, server.lists, 5)

		server.fail(nil, nil)
		elapse(2 * time.Minute)
		require.True(t, m.isSynced())
		require.NoError(t, m.Err())
		require.Equal(t, []error{forbidden, nil}, m.errs)
		require.Equal(t, []string{"a ->1"}, m.told())

		server.fail(apierrors.NewInternalError(errors.New("x")), forbidden)
		server.breakWatch()
		elapse(10 * time.Minute)
		require.Len(t, m.errs, 3)
		require.Error(t, m.errs[2])
		require.Error(t, m.Err())
		require.Equal(t, map[string]int{"a": 1}, m.content(), "what it had, it keeps")
		server.fail(nil, nil)
		elapse(2 * time.Minute)
		require.Len(t, m.errs, 4)
		require.NoError(t, m.errs[3])

		lines := strings.Split(strings.TrimSpace(m.log.String()), "\n")
		require.Len(t, lines, 4, "a line for each transition, and no other")
		for i, says := range []string{"watch failed", "watch works again", "watch failed", "watch works again"} {
			require.Contains(t, lines[i], says)
			require.Contains(t, lines[i], "things")
		}
		requireSilent(t, m.log.String())
	})
}

// The rights to list without those to watch, for instance.
func TestAWatchThatIsRefusedAfterEveryListIsOneError(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		forbidden := apierrors.NewForbidden(secrets, "pull", errors.New("no"))
		server := newMemory(false, thing("a", 1))
		server.fail(nil, forbidden)
		m := watchIn(t, server, false)
		elapse(10 * time.Minute)
		require.True(t, m.isSynced())
		require.Greater(t, server.lists, 5)
		require.Equal(t, []error{forbidden}, m.errs)
		require.ErrorIs(t, m.Err(), forbidden)
		require.Equal(t, 1, strings.Count(m.log.String(), "\n"), m.log.String())
		server.fail(nil, nil)
		elapse(2 * time.Minute)
		require.Equal(t, []error{forbidden, nil}, m.errs)
	})
}

// A server without watch-list refuses the first watch: that is no error.
func TestAServerThatCannotStreamIsNoError(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		m := watchIn(t, newMemory(false, thing("a", 1)), false)
		require.True(t, m.isSynced())
		require.Equal(t, 2, m.server.watches)
		require.Equal(t, 1, m.server.lists)
		require.Empty(t, m.errs)
		require.Empty(t, m.log.String())
	})
}

// A server that is not there, and one that is too busy: client-go tries these again by
// itself, deep inside the first watch.
func TestAServerThatIsAwayFromTheStartIsAnErrorAndHoldsNothingUp(t *testing.T) {
	t.Parallel()
	for name, err := range map[string]error{
		"away": fmt.Errorf("dial tcp: %w", syscall.ECONNREFUSED),
		"busy": apierrors.NewTooManyRequestsError("slow down"),
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				server := newMemory(true, thing("a", 1))
				server.fail(err, err)
				m := watchIn(t, server, false)
				elapse(5 * time.Minute)
				require.Len(t, m.errs, 1)
				require.Error(t, m.Err())
				require.Contains(t, m.log.String(), "watch failed")

				start := time.Now()
				m.stop()
				require.Less(t, time.Since(start), Grace, "it ends when it is told to")
				require.Len(t, m.errs, 1, "its end is no error")
			})
		})
	}
}

func TestAServerThatComesBackIsUsedAgain(t *testing.T) {
	t.Parallel()
	both(t, func(t *testing.T, streams bool) {
		away := fmt.Errorf("dial tcp: %w", syscall.ECONNREFUSED)
		server := newMemory(streams, thing("a", 1))
		server.fail(away, away)
		m := watchIn(t, server, false)
		elapse(time.Minute)
		server.fail(nil, nil)
		elapse(time.Minute)
		require.True(t, m.isSynced())
		require.Equal(t, []string{"a ->1"}, m.told())
		require.NoError(t, m.Err())
	})
}

func TestTheEndOfAMirrorIsNoError(t *testing.T) {
	t.Parallel()
	both(t, func(t *testing.T, streams bool) {
		m := watchIn(t, newMemory(streams, thing("a", 1)), false)
		m.stop()
		require.Empty(t, m.errs)
		require.NoError(t, m.Err())
		require.Empty(t, m.log.String())
		require.Equal(t, map[string]int{"a": 1}, m.content())
	})
}

func TestWhatIsNoObjectIsAnErrorThatDoesNotShowIt(t *testing.T) {
	t.Parallel()
	m := NewMirror(MirrorConfig[int]{Name: "things", Convert: func(runtime.Object) int { return 1 }})
	list := &corev1.ConfigMapList{Items: []corev1.ConfigMap{*thing("a", 1)}}
	for _, object := range []any{canary, nil, list} {
		for _, err := range []error{m.upsert(object), m.remove(object), m.replace([]any{object}, "1")} {
			require.ErrorContains(t, err, "mirror things")
			requireSilent(t, err.Error())
		}
	}
	require.Zero(t, m.Len())
}

func TestNewerComparesResourceVersions(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		a, b string
		want bool
	}{
		{"2", "1", true},
		{"1", "2", false},
		{"1", "1", false},
		{"10", "9", true},
		{"99999999999999999999", "9", true},
		{"", "1", false},
		{"1", "", false},
		{"x", "1", false},
		{"1", "x", false},
	} {
		require.Equal(t, test.want, Newer(test.a, test.b), "%q, %q", test.a, test.b)
	}
}
