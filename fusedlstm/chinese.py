"""Chinese prose from a grammar, for the demo and the programs: nothing has to be downloaded.

Each paragraph is a day in a diary.  What makes it harder than its few hundred characters suggest is what has
to agree over a distance: a measure word with its noun (三本书, 三条鱼), "because" with "so", a name with its
pronoun, a quotation mark with its partner, and the last sentence with the gift of the first.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

DAYS = 2400

THINGS = {  # by measure word
    "本": ("书", "词典", "画册"),
    "条": ("鱼", "围巾", "裙子"),
    "朵": ("玫瑰", "菊花"),
    "把": ("雨伞", "椅子", "剪刀"),
    "件": ("毛衣", "衬衫", "大衣"),
    "张": ("照片", "地图", "邮票"),
    "只": ("小猫", "鸭子", "手表"),
    "双": ("布鞋", "筷子", "手套"),
    "支": ("钢笔", "毛笔"),
    "棵": ("白菜", "小树"),
    "杯": ("绿茶", "豆浆"),
    "盏": ("台灯", "灯笼"),
    "袋": ("大米", "糖果", "水果"),
    "幅": ("山水画", "书法"),
}
NUMBERS = ("一", "两", "三", "四", "五", "六", "七", "八", "九", "十")
PEOPLE = {  # and their pronouns
    "小明": "他",
    "小红": "她",
    "李老师": "她",
    "王师傅": "他",
    "奶奶": "她",
    "爷爷": "他",
    "张医生": "他",
    "表妹": "她",
    "邻居老陈": "他",
    "阿姨": "她",
}
PLACES = (
    "市场", "公园", "图书馆", "书店", "车站", "学校", "茶馆", "河边", "花园", "博物馆", "超市", "广场"
)  # fmt: skip
WEATHER = {  # and what one does about it
    "晴": ("阳光很好", "没有坐车，一路走了过去"),
    "小雨": ("外面下着小雨", "打着伞出了门"),
    "大雨": ("雨下得很大", "等到中午才出门"),
    "小雪": ("路上有雪", "走得很慢"),
    "大风": ("风刮得厉害", "戴上帽子才出门"),
    "多云": ("天气不冷不热", "骑着自行车出了门"),
    "雾": ("雾还没有散", "坐了一趟早班车"),
}
FEELINGS = ("高兴极了", "非常感动", "笑了起来", "连声道谢", "有点不好意思")
SPOTS = ("桌子上", "窗台上", "柜子里", "门口", "书架旁边", "客厅里")
HOBBIES = ("下棋", "包饺子", "听音乐", "看电影", "练字", "聊天", "做饭")
TROUBLES = ("路很远", "天色不早了", "价钱不便宜", "人很多", "身体有些累")
DIGITS = "一二三四五六七八九"


def numeral(number: int) -> str:
    """A number from 1 to 99 as it is read."""
    tens, ones = divmod(number, 10)
    ten = {0: "", 1: "十"}.get(tens, DIGITS[tens - 1] + "十")
    return ten + (DIGITS[ones - 1] if ones else "")


def day(random: np.random.Generator) -> str:
    """One paragraph."""

    def pick(options: Sequence[str]) -> str:
        return options[int(random.integers(len(options)))]

    who, friend = (list(PEOPLE)[n] for n in random.choice(len(PEOPLE), 2, replace=False))
    pronoun = PEOPLE[who]
    measure = pick(list(THINGS))
    thing, number = pick(THINGS[measure]), pick(NUMBERS)
    gift = f"{number}{measure}{thing}"
    shop, home = (PLACES[n] for n in random.choice(len(PLACES), 2, replace=False))
    sky, other_sky = (list(WEATHER)[n] for n in random.choice(len(WEATHER), 2, replace=False))
    cause, effect = WEATHER[sky]
    date = f"{numeral(int(random.integers(1, 13)))}月{numeral(int(random.integers(1, 29)))}日"
    opening = f"今天是{date}，星期{pick('一二三四五六日')}，{sky}。"
    because = pick([f"因为{cause}，所以{who}{effect}。", f"{cause}，于是{who}{effect}。"])
    bought = pick(
        [
            f"{pronoun}先到{shop}买了{gift}，然后去{home}看{friend}。",
            f"{pronoun}在{shop}看见{gift}，想起{friend}一直想要，就买了下来，带到了{home}。",
            f"虽然{pick(TROUBLES)}，但是{pronoun}还是从{shop}带回{gift}，送给住在{home}附近的{friend}。",
        ]
    )
    talk = pick(
        [
            f"“{pick(['这', '那'])}{number}{measure}{thing}是给谁的？”{friend}问。“是给你的。”{who}回答。",
            f"“你怎么知道我喜欢{thing}？”{friend}问{who}。“上个月你自己说的。”{pronoun}笑着说。",
            f"{who}说：“{thing}不贵，你就收下吧。”",
            "",
        ]
    )
    thanks = f"{friend}{pick(FEELINGS)}，把{thing}放在{pick(SPOTS)}。"
    plan = pick(
        [
            f"他们说好，如果明天是{sky}，就再去{shop}；要是{other_sky}，就在家里{pick(HOBBIES)}。",
            f"后来，他们一边{pick(HOBBIES)}，一边谈起{home}的事。",
            "",
        ]
    )
    diary = f"晚上，{who}在日记里写道：“今天送给{friend}{gift}，{PEOPLE[friend]}{pick(FEELINGS)}。”"
    return opening + because + bought + talk + thanks + plan + diary


def text(days: int = DAYS, seed: int = 0) -> str:
    """A diary of some days, a paragraph each."""
    random = np.random.default_rng(seed)
    return "\n\n".join(day(random) for _ in range(days))
